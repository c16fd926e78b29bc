"""Layers that keep only their input for backward, chosen anew for every forward.

Megatron chooses recomputed layers once, by their count; a plan chooses them for every
sub-microbatch.  Here the choice holds for one forward of a chunk of any class, so that passes with
different choices may be in flight at the same time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_dip.models.layer_forwards import changed_forwards

__all__ = ["recomputed_layers"]


def recomputed_layers(
    chunk: torch.nn.Module, layers: Sequence[int]
) -> AbstractContextManager[None]:
    """While in it, forwards of these layers keep only what they are given.

    Args:
        chunk: One stage.
        layers: Numbers in the module, from 0.

    Raises:
        ValueError: A layer that this chunk does not hold.
    """
    return changed_forwards(chunk, layers, _Recomputing, reason="recomputed")


class _Recomputing:
    """The forward of a layer, run once without a graph, and again in backward."""

    def __init__(self, layer: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        trains = any(parameter.requires_grad for parameter in self._layer.parameters())
        if not torch.is_grad_enabled() or not (inputs or trains):
            return self._forward(*args, **kwargs)
        if not inputs:
            # Checkpoints build a graph from inputs that need gradients alone, also where it is
            # the parameters inside that are trained.
            first = next(
                index
                for index, leaf in enumerate(leaves)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
            )
            leaves[first] = leaves[first].detach().requires_grad_()
            inputs = [leaves[first]]
        return _run(self._layer, self._forward, leaves, structure, inputs)


def _run(
    layer: torch.nn.Module,
    forward: Callable[..., Any],
    leaves: list[Any],
    structure: Any,
    inputs: list[Tensor],
) -> Any:
    """Checkpoint ``forward`` between the inputs and those outputs that it makes anew."""
    given = {id(leaf): index for index, leaf in enumerate(inputs)}
    places = [given.get(id(leaf)) for leaf in leaves]
    results: list[Any] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = [
            leaf if place is None else tensors[place]
            for leaf, place in zip(leaves, places, strict=True)
        ]
        args, kwargs = tree_unflatten(own, structure)
        outputs, form = tree_flatten(forward(*args, **kwargs))
        unchanged = {id(leaf): index for index, leaf in enumerate(own)}
        made = [
            isinstance(one, Tensor) and one.is_floating_point() and id(one) not in unchanged
            for one in outputs
        ]
        if not results:
            # What is only handed on must be what the caller gave, not a copy of a checkpoint's.
            results.extend((form, made, [unchanged.get(id(one)) for one in outputs], outputs))
        return tuple(one for one, is_made in zip(outputs, made, strict=True) if is_made)

    made_outputs = iter(_checkpoint(layer, run, inputs))
    form, made, handed_on, outputs = results
    results[3] = None
    found = [
        next(made_outputs) if is_made else (one if index is None else leaves[index])
        for one, is_made, index in zip(outputs, made, handed_on, strict=True)
    ]
    return tree_unflatten(found, form)


def _checkpoint(
    layer: torch.nn.Module, run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    config: Any = getattr(layer, "config", None)
    if getattr(config, "fp8", None) or getattr(config, "fp4", None):
        from megatron.core.extensions.transformer_engine import te_checkpoint

        # Of the run: not every layer holds its groups.
        group = parallel_state.get_tensor_model_parallel_group()
        outputs = te_checkpoint(run, False, get_cuda_rng_tracker, group, *inputs)
    else:
        outputs = checkpoint(run, False, *inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
