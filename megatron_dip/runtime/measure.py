"""Bytes that works leave for their backward, as autograd keeps them."""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["StoredBytes"]


class StoredBytes:
    """Bytes of tensors that autograd keeps for backward, each memory once, parameters not counted.

    Held bytes fall when backward frees what it has used.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._references: dict[int, int] = {}
        self.held = 0
        self.peak = 0

    @contextmanager
    def counting(self) -> Any:
        """Count what forwards inside keep."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._parameters or not storage.nbytes():
            return _Kept(tensor, None, 0, 0)
        if not self._references.get(address):
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self._references[address] = self._references.get(address, 0) + 1
        return _Kept(tensor, self, address, storage.nbytes())

    def release(self, address: int, num_bytes: int) -> None:
        """One keeper of this memory less."""
        self._references[address] -= 1
        if not self._references[address]:
            del self._references[address]
            self.held -= num_bytes


class _Kept:
    """A kept tensor; its end is the end of the keeping."""

    def __init__(
        self, tensor: Tensor, owner: StoredBytes | None, address: int, num_bytes: int
    ) -> None:
        self.tensor = tensor
        self._owner, self._address, self._num_bytes = owner, address, num_bytes

    def __del__(self) -> None:
        if self._owner is not None:
            self._owner.release(self._address, self._num_bytes)
