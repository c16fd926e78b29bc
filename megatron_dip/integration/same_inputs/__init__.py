"""Whether all ranks of a run were given the same: compared once, before they work together."""

from megatron_dip.integration.same_inputs.collect import file_input, form_inputs
from megatron_dip.integration.same_inputs.compare import Input, compare_inputs
from megatron_dip.integration.same_inputs.run import check_same_index, check_same_inputs

__all__ = [
    "Input",
    "check_same_index",
    "check_same_inputs",
    "compare_inputs",
    "file_input",
    "form_inputs",
]
