"""Hooks on what autograd keeps for backward, which leave weights what they are.

Torch gives a backward that reads ``saved_tensors`` a new tensor in place of what an unpacking hook
returns.  Of a weight, attributes are then missing that layers read and set in their backward:
``main_grad`` to add to, and ``grad_added_to_main_grad``, without which a gradient is added twice or
not at all.  So a backward is handed the weights themselves, as without hooks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import Parameter

__all__ = ["saving"]


class _Unpacked(threading.local):
    """The weights that hooks have returned while one backward reads what it has saved."""

    weights: list[Parameter] | None = None


_unpacked = _Unpacked()


@contextmanager
def saving[KeptT](
    pack: Callable[[Tensor], KeptT], unpack: Callable[[KeptT], Tensor]
) -> Iterator[None]:
    """What forwards inside save is packed by ``pack``, and unpacked where a backward reads it.

    Args:
        pack: Of a weight, it keeps the weight itself.
        unpack: Of a weight, it returns that again.
    """
    if "saved_tensors" not in vars(BackwardCFunction):
        BackwardCFunction.saved_tensors = property(_saved_tensors)  # type: ignore[assignment]

    def unpack_and_note(kept: KeptT) -> Tensor:
        tensor = unpack(kept)
        if _unpacked.weights is not None and isinstance(tensor, Parameter):
            _unpacked.weights.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack_and_note):
        yield


def _saved_tensors(context: BackwardCFunction) -> tuple[Tensor | None, ...]:
    """As torch's, with weights themselves where there is a hook."""
    outer, _unpacked.weights = _unpacked.weights, []
    try:
        found: tuple[Tensor | None, ...] = super(BackwardCFunction, context).saved_tensors
        weights = {_place(weight): weight for weight in _unpacked.weights}
    finally:
        _unpacked.weights = outer
    if not weights:
        return found
    return tuple(None if one is None else weights.get(_place(one), one) for one in found)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
