"""What plans ask of ``--tp-comm-overlap``."""

from typing import Any

from megatron_dip.costs.shapes import ModelShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.partition import Partition

__all__ = ["check_tensor_overlap"]


def check_tensor_overlap(
    config: Any, model: ModelShape, partition: Partition, *, varies_parts: bool
) -> None:
    """Refuse it where tensors of other shapes than Megatron's buffers would go through these.

    Megatron makes the buffers once, for ``--seq-length`` rows of ``--micro-batch-size`` samples of
    the language model's width.  Whole microbatches of a model of one module have this shape.

    Args:
        config: Megatron's configuration of the module with the loss.
        varies_parts: Whether ``--dip-vary-parts`` splits microbatches.

    Raises:
        UnsupportedError: A module is split, or there are several.
    """
    if not getattr(config, "tp_comm_overlap", False):
        return
    reason = None
    if len(model.modules) > 1:
        reason = f"modules {' and '.join(module.name for module in model.modules)}"
    elif partition.sub_microbatch_tokens:
        reason = f"sub_microbatch_tokens of module {model.modules[0].name}"
    elif varies_parts:
        reason = "--dip-vary-parts"
    if reason is not None:
        raise UnsupportedError(
            f"--tp-comm-overlap does not work with {reason} and --dip-schedule: its buffers are "
            f"made once, for --seq-length rows of --micro-batch-size whole samples of a language "
            f"model (leave the flag out, or keep microbatches of a model of one module whole)"
        )
