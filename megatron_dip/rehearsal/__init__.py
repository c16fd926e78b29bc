"""Rehearsals: a plan run by the real executor over real transfers, computing replaced by sleeping.

``scaling`` makes the plan that is rehearsed, ``processes`` starts a process per rank and collects
what they measured; ``rank`` is what runs there, and alone needs torch.
"""

from megatron_dip.rehearsal.processes import Rehearsal, rehearse
from megatron_dip.rehearsal.results import measured_rehearsal_panel, rehearsal_json
from megatron_dip.rehearsal.scaling import scale_plan

__all__ = [
    "Rehearsal",
    "measured_rehearsal_panel",
    "rehearsal_json",
    "rehearse",
    "scale_plan",
]
