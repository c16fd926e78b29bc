"""Layers of a stage by their numbers, and forwards of some of them changed for one call.

A layer is known by its ``layer_number``, which Megatron's layers have.  A plan chooses layers anew
for every sub-microbatch, so that a change holds for one forward of a chunk of any class.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

__all__ = ["changed_forwards", "numbered_layers"]

type Forward = Callable[..., Any]


def numbered_layers(chunk: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The layers of a chunk, in whatever it is wrapped, by their numbers in the module, from 0.

    Layers of multi-token prediction have numbers of their own and are not among them.
    """
    found: dict[int, torch.nn.Module] = {}
    if isinstance(chunk, MultiTokenPredictionBlock):
        return found
    for child in chunk.children():
        number = getattr(child, "layer_number", None)
        if isinstance(chunk, torch.nn.ModuleList) and isinstance(number, int):
            found[number - 1] = child
        else:
            found |= numbered_layers(child)
    return found


@contextmanager
def changed_forwards(
    chunk: torch.nn.Module,
    layers: Sequence[int],
    change: Callable[[torch.nn.Module, Forward], Forward],
    *,
    reason: str,
) -> Iterator[None]:
    """While in it, these layers run ``change(layer, forward)`` in place of their ``forward``.

    Args:
        chunk: One stage.
        layers: Numbers in the module, from 0.
        change: Gives the new forward of a layer.
        reason: What the layers are wanted for, for the message.

    Raises:
        ValueError: A layer that this chunk does not hold.
    """
    held = numbered_layers(chunk) if layers else {}
    if not held.keys() >= set(layers):
        raise ValueError(
            f"layers {sorted(set(layers) - held.keys())} to be {reason} are not in this stage, "
            f"which holds layers {sorted(held)}"
        )
    before = {held[number]: vars(held[number]).get("forward") for number in layers}
    for layer in before:
        layer.forward = change(layer, layer.forward)
    try:
        yield
    finally:
        for layer, own in before.items():
            del layer.forward
            if own is not None:
                layer.forward = own
