"""What Megatron's wrappers of chunks do otherwise under a plan: reductions and 16-bit outputs."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from megatron_dip.integration.stages import place_of
from megatron_dip.plan import Plan

__all__ = ["boundaries_in_16_bits", "reduces_early", "without_gradient_sync"]


def reduces_early(model: Sequence[torch.nn.Module]) -> bool:
    """Whether gradients may be reduced as soon as a stage's last backward is done.

    Without overlap a reduction blocks, and finalizing would do it a second time; with several
    optimizer instances its handle is lost, with the same effect.
    """
    ddp_config = getattr(model[0], "ddp_config", None)
    return bool(
        ddp_config is not None
        and ddp_config.overlap_grad_reduce
        and ddp_config.num_distributed_optimizer_instances == 1
    )


def without_gradient_sync(model: Sequence[torch.nn.Module]) -> ExitStack:
    """Megatron's own hooks count backwards of the first batch; a plan's differ per batch."""
    stack = ExitStack()
    for chunk in model:
        if hasattr(chunk, "no_sync"):
            stack.enter_context(chunk.no_sync())  # type: ignore[operator]
    return stack


def boundaries_in_16_bits(model: Sequence[torch.nn.Module], plan: Plan) -> ExitStack:
    """Megatron's 16-bit wrapper turns all outputs of the last rank into 32 bits, not losses only.

    It takes them for losses because no virtual pipeline is on.
    """
    stack = ExitStack()
    for chunk in model:
        if plan.graph.is_loss_stage(place_of(chunk).stage.stage):
            continue
        wrapper = chunk
        while isinstance(wrapper, torch.nn.Module):
            if isinstance(wrapper, Float16Module):
                hook = wrapper.register_forward_pre_hook(_keep_precision, with_kwargs=True)
                stack.enter_context(hook)
            wrapper = getattr(wrapper, "module", None)  # type: ignore[assignment]
    return stack


def _keep_precision(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"fp32_output": False}
