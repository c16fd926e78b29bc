"""Bytes that works leave for their backward, as autograd keeps them."""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_dip.runtime.saved_tensors import saving

__all__ = ["StoredBytes"]


class StoredBytes:
    """Bytes of tensors that autograd keeps for backward, each memory once, parameters not counted.

    Held bytes fall when backward frees what it has used, and while memory is away.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._keepers: dict[int, int] = {}
        """How many keep a memory, by the address of its description: that of the memory itself
        changes where it is emptied and filled again."""
        self.held = 0
        self.peak = 0

    @contextmanager
    def counting(self) -> Any:
        """Count what forwards inside keep."""
        with saving(self._pack, lambda kept: kept[0]):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, "_Keeper | None"]:
        return tensor, self.keep(tensor)

    def keep(self, tensor: Tensor) -> "_Keeper | None":
        """Count the memory of ``tensor``, which must live as long, to the end of what is returned;
        None where it does not count."""
        storage = tensor.untyped_storage()
        num_bytes = storage.nbytes()
        if not num_bytes or storage.data_ptr() in self._parameters:
            return None
        before = self._keepers.get(storage._cdata, 0)
        self._keepers[storage._cdata] = before + 1
        if not before:
            self._add(num_bytes)
        return _Keeper(self, storage._cdata, num_bytes)

    def leave(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Memory of so many bytes is emptied for a while, if it is counted."""
        if storage._cdata in self._keepers:
            self.held -= num_bytes

    def come_back(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Memory that had left is taken again."""
        if storage._cdata in self._keepers:
            self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)

    def release(self, address: int, num_bytes: int) -> None:
        """One keeper of this memory less."""
        self._keepers[address] -= 1
        if not self._keepers[address]:
            del self._keepers[address]
            self.held -= num_bytes


class _Keeper:
    """Counts as long as it lives."""

    def __init__(self, owner: StoredBytes, address: int, num_bytes: int) -> None:
        self._owner, self._address, self._num_bytes = owner, address, num_bytes

    def __del__(self) -> None:
        self._owner.release(self._address, self._num_bytes)
