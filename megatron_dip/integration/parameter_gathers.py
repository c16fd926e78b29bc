"""``--overlap-param-gather`` under a plan: parameters that replicas gather beneath a step.

Megatron's own hooks start a gather where a module is used first in a step.  Replicas with
different plans use their modules in different orders, and a replica whose batch has nothing for a
stage does not use it at all, so that gathers of one communicator would not meet.  Here a step
starts all of them first, in the order of stages, which is the same on all replicas and about that
in which plans use them; a stage waits for its own before it is used.  The hooks find nothing to do.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dip.integration.stages import place_of

__all__ = ["finish_gathers", "start_gathers"]


def start_gathers(model: Sequence[torch.nn.Module]) -> None:
    """Start gathering what the optimizer has changed, unless that is done.

    It is where Megatron has turned its hooks off: in the first step of a run and in evaluation;
    and in the step after one that evaluated or saved.
    """
    for chunk in sorted(model, key=lambda chunk: place_of(chunk).stage.stage):
        if not all(group.param_gather_dispatched for group in _groups(chunk)):
            chunk.start_param_sync()  # type: ignore[operator]


def finish_gathers(chunk: torch.nn.Module) -> None:
    """Wait for the parameters of ``chunk``; to be called before they, or their buffers, are used.

    At the end of a step it must be called for all chunks, also those that nothing has used:
    the optimizer writes where they are gathered.
    """
    for group in _groups(chunk):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _groups(chunk: torch.nn.Module) -> list[Any]:
    """Groups of buckets with parameters to gather; none where Megatron has its hooks off."""
    if not getattr(chunk, "remove_forward_pre_hook_handles", None):
        return []
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]  # type: ignore[misc]
