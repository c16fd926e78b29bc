"""Weight gradients that Transformer Engine's layers put off, for backwards in two parts.

A backward of such a layer stores what its weight gradient is made of; ``backward_dw`` makes one,
the oldest.  So the input gradients of a plan (``I``) are a whole backward, which reaches every
weight that puts nothing off at once, and its weight gradients (``W``) make what that backward
stored.  Each layer hands out what it stored first: where the ``W`` of a stage come in another order
than its ``I``, one makes what belongs to another, and the sum over the batch is the same.

Megatron has the same for its own overlap of experts' exchange (``delay_wgrad_compute``), which its
configuration allows with that alone; here layers are told after they are constructed.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_dip.errors import UnsupportedError

__all__ = [
    "StoredWeightGradients",
    "delay_weight_gradients",
    "hook_data_parallel",
    "require_delays",
]

# Megatron's wrapper of chunks needs the last one, which Transformer Engine has from 2.8 on.
_OF_DELAYING_LAYERS = (
    "wgrad_store",
    "weight_names",
    "bias_names",
    "apply_bias",
    "gemm_bias_unfused_add",
    "backward_dw",
    "config",
    "register_wgrad_accumulation_and_reduce_hooks",
)


def delay_weight_gradients(chunk: torch.nn.Module) -> int:
    """Let the layers of ``chunk`` that can put their weight gradients off do so.

    As Transformer Engine's constructors do; to be called before the chunk is wrapped.

    Returns:
        How many there are.
    """
    layers = [layer for layer in chunk.modules() if _can_delay(layer)]
    for layer in layers:
        found: Any = layer
        # Wrappers of Megatron ask their configuration, which other layers share.
        found.config = copy.copy(found.config)
        found.config.delay_wgrad_compute = True
        if hasattr(found, "delay_wgrad_compute"):
            found.delay_wgrad_compute = True
        found.wgrad_store = type(found.wgrad_store)(True)
        names = set(found.weight_names)
        if found.apply_bias and not found.gemm_bias_unfused_add:
            # Only then is the bias a part of the product; else its gradient comes like any other,
            # and Megatron's wrapper must be told of it when it comes.
            names |= set(found.bias_names)
        for name, parameter in found.named_parameters(recurse=False):
            if name in names:
                parameter.skip_backward_post_hook = True
    return len(layers)


def _can_delay(layer: Any) -> bool:
    return all(hasattr(layer, name) for name in _OF_DELAYING_LAYERS)


def require_delays(num_layers: Iterable[int], config: Any) -> None:
    """
    Args:
        num_layers: That put weight gradients off, of all ranks.
        config: Megatron's, of the run.

    Raises:
        UnsupportedError: There are none.  Or in 8 bits, where gradients of biases come with those
            of inputs, which Megatron's wrapper of chunks does not expect of layers that put them
            off.  Or layers exchange while they compute weight gradients.
    """
    for name, flag in (("fp8", "--fp8-format"), ("tp_comm_overlap", "--tp-comm-overlap")):
        if getattr(config, name):
            raise UnsupportedError(
                f"schedule.split_backward does not work with {flag}: leave one of the two out"
            )
    if not any(num_layers):
        raise UnsupportedError(
            "schedule.split_backward needs layers that keep their weight gradients apart, and this "
            "model has none: use --transformer-impl transformer_engine with Transformer Engine 2.8 "
            "or newer, or leave the key out"
        )


def hook_data_parallel() -> None:
    """Let Megatron's wrapper of chunks wait for weight gradients that are put off.

    It has a switch for it, which its arguments allow with other flags alone.
    """
    from megatron.core.distributed import DistributedDataParallel

    wrap = DistributedDataParallel.__init__
    if getattr(wrap, "waits_for_weights", False):
        return

    @functools.wraps(wrap)
    def wrap_waiting(
        self: Any, config: Any, ddp_config: Any, module: torch.nn.Module, *more: Any, **named: Any
    ) -> None:
        if any(getattr(one, "skip_backward_post_hook", False) for one in module.parameters()):
            ddp_config = replace(ddp_config, delay_wgrad_compute=True)
        wrap(self, config, ddp_config, module, *more, **named)

    wrap_waiting.waits_for_weights = True  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = wrap_waiting


class StoredWeightGradients:
    """What the layers of one wrapped chunk have put off.

    Args:
        modules: Of the chunk; none where no layer was told to put anything off.

    Raises:
        UnsupportedError: Nothing would add what they make to the gradients of the batch.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._layers: list[Any] = [
            layer
            for layer in modules
            if _can_delay(layer) and layer.wgrad_store.delay_wgrad_compute()  # type: ignore[operator, union-attr]
        ]
        for layer in self._layers:
            is_trained = any(parameter.requires_grad for parameter in layer.parameters())
            # One that is made replaces the one before it, unless a wrapper takes that away.
            if is_trained and not layer.wgrad_accumulation_and_reduce_hooks:
                raise UnsupportedError(
                    "schedule.split_backward needs chunks in Megatron's DistributedDataParallel, "
                    "which adds up the weight gradients that layers put off (leave the key out)"
                )

    def counts(self) -> tuple[int, ...]:
        """Per layer, how many are stored."""
        return tuple(layer.wgrad_store.context.qsize() for layer in self._layers)

    def make(self, counts: Sequence[int]) -> None:
        """Make so many of each layer, the oldest first; without a graph, as within a backward."""
        with torch.no_grad():
            for layer, count in zip(self._layers, counts, strict=True):
                for _ in range(count):
                    layer.backward_dw()
