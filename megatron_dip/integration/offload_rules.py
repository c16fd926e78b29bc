"""What offloading asks of a model and of the flags of a run."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.layer_forwards import numbered_layers
from megatron_dip.partition import Stage

__all__ = ["check_offloads"]


def check_offloads(chunks: Mapping[Stage, torch.nn.Module], config: Any) -> None:
    """
    Args:
        chunks: The stages of this rank.
        config: Megatron's, of the run.

    Raises:
        UnsupportedError: Activations of some layers could not be moved.
    """
    if config.recompute_granularity == "full":
        raise UnsupportedError(
            "schedule.offload does not work with --recompute-granularity full, under which layers "
            "keep nothing that could be moved (leave one of the two out: plans recompute layers "
            "themselves where memory is short)"
        )
    for stage, chunk in chunks.items():
        missing = sorted(set(stage.layers) - numbered_layers(chunk).keys())
        if missing:
            raise UnsupportedError(
                f"schedule.offload: layers {missing} of {stage.module} are not told apart in their "
                f"stage (expected layers with a layer_number in a ModuleList, as Megatron's blocks "
                f"have them; leave the key out)"
            )
