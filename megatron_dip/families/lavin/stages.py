"""What the stages of both towers share: which parameters are tuned, and how they start."""

from collections.abc import Sequence

from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.families.packed.stage import StageModule

__all__ = ["freeze_towers", "is_adapter", "trainable_parameters"]


def is_adapter(name: str) -> bool:
    """Whether the parameter called ``name`` is tuned: adapters, neck and modality table."""
    return "adapter" in name


def freeze_towers(stage: StageModule) -> None:
    """Leave only adapters, neck and modality table to be tuned.

    Call it before Megatron's wrappers are put on: they look at it once.
    """
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def trainable_parameters(stages: Sequence[StageModule]) -> int:
    """How many numbers are tuned; also of stages on torch's meta device."""
    return sum(
        parameter.numel()
        for stage in stages
        for name, parameter in named_global_parameters(stage)
        if parameter.requires_grad
    )
