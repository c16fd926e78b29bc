"""Activations of chosen layers, held in the memory of the host between forward and backward.

Tensors that these layers save for backward are collected as autograd packs them.  What is moved is
the memory behind them, once however many tensors share it: its bytes are copied to the host, it is
emptied, and later filled again.  So every view of it is what it was, with its strides.

Only memory that nobody else holds is moved.  Who holds it is not guessed from names but counted:
weights, tables of positions, masks, what a layer that is not offloaded saves too, rows that several
works of the rank read, a stage's own output and what is still being sent have other holders, and
stay.  The rows that a stage has received belong to its work alone, and go with it.

On a GPU each direction has a stream.  A copy begins behind the computing that was queued before it,
and computing waits for it by an event; the host waits for nothing.  Memory is emptied, taken and
read in the order of the computing stream, so that the allocator may hand it out at once.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dip.errors import PlanError
from megatron_dip.runtime.measure import StoredBytes
from megatron_dip.runtime.saved_tensors import saving

__all__ = ["HostBlocks", "OffloadedLayers", "Offloader"]

_BLOCK_BYTES = 16 * 2**20
_ALIGNMENT = 512
"""Of pieces within a block: what copies like."""

_log = logging.getLogger(__name__)


class HostBlocks:
    """Memory of the host in blocks of one size, kept for later copies.

    Batches differ in size, so that buffers as large as a tensor would rarely be used again.

    Args:
        block_bytes: Size of a block.
        is_pinned: Whether it is page-locked, as copies need for which the host shall not wait.
    """

    def __init__(self, block_bytes: int, *, is_pinned: bool) -> None:
        self.block_bytes = block_bytes
        self.num_blocks = 0
        """Taken from the host, in use or not."""
        self._is_pinned = is_pinned
        self._free: list[Tensor] = []

    @property
    def bytes_in_use(self) -> int:
        return (self.num_blocks - len(self._free)) * self.block_bytes

    def take(self, num_blocks: int) -> list[Tensor]:
        """So many blocks, of those that were given back first."""
        taken = [self._free.pop() for _ in range(min(num_blocks, len(self._free)))]
        for _ in range(num_blocks - len(taken)):
            self.num_blocks += 1
            made = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            taken.append(made)
        return taken

    def give(self, blocks: Sequence[Tensor]) -> None:
        """Take blocks back that no later work reads."""
        self._free.extend(blocks)


class Offloader:
    """Moves the activations of one rank; one for all steps, so that host memory is used again.

    Args:
        device: Where stages compute.
        block_bytes: See :class:`HostBlocks`.
    """

    def __init__(self, device: torch.device, block_bytes: int = _BLOCK_BYTES) -> None:
        self.most_bytes = 0
        """Of host memory, at any time."""
        self.moved_bytes = 0
        """Copied to the host so far."""
        self.place = torch.empty(0, device=device).untyped_storage().device
        """Of what is moved. In CPU mode, tensors for a GPU are on the host."""
        self._device = device
        self._has_streams = device.type == "cuda"
        self.blocks = HostBlocks(block_bytes, is_pinned=self._has_streams)
        self._out, self._back = (
            torch.cuda.Stream(device) if self._has_streams else None for _ in range(2)
        )
        self._has_warned = False

    def copying(self, *, to_host: bool) -> AbstractContextManager[object]:
        """Within it, copies run on the stream of their direction, behind all computing so far."""
        stream = self._out if to_host else self._back
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(stream)

    def event(self) -> torch.cuda.Event | None:
        """The end of what the current stream was given so far."""
        if not self._has_streams:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for ``event``."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def take(self, sizes: Sequence[int]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Host memory for tensors of ``sizes`` bytes, in order, as far as there is room.

        Returns:
            The blocks, and for each tensor the pieces of them that hold it; fewer than ``sizes``
            where the rest would be more than ``most_bytes``, which is warned of once.
        """
        block = self.blocks.block_bytes
        room = (self.most_bytes - self.blocks.bytes_in_use) // block * block
        spans: list[tuple[int, int]] = []
        end = 0
        for size in sizes:
            if end + size > room:
                self._warn(sum(sizes[len(spans) :]))
                break
            spans.append((end, end + size))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        last = spans[-1][1] if spans else 0
        blocks = self.blocks.take(-(-last // block))
        return blocks, [list(_pieces(blocks, block, *span)) for span in spans]

    def _warn(self, num_bytes: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        _log.warning(
            "%d bytes of activations stay on the device: %d of at most %d bytes of host memory "
            "are in use (layers keep more than the costs say; let plans use more memory of the "
            "host)",
            num_bytes,
            self.blocks.bytes_in_use,
            self.most_bytes,
        )


def _pieces(blocks: Sequence[Tensor], block_bytes: int, start: int, end: int) -> Iterator[Tensor]:
    """The bytes from ``start`` to ``end`` of ``blocks`` laid in a row."""
    while start < end:
        number, offset = divmod(start, block_bytes)
        stop = min(end, (number + 1) * block_bytes)
        yield blocks[number][offset : offset + stop - start]
        start = stop


class _Kept:
    """A tensor that is saved for backward; its end is the end of the saving."""

    __slots__ = ("__weakref__", "counted", "tensor", "version")

    def __init__(self, tensor: Tensor, counted: object) -> None:
        # Not the tensor itself: an output would hold the graph by which it is held.
        self.tensor = tensor if isinstance(tensor, Parameter) else tensor.detach()
        self.version = tensor._version
        self.counted = counted


class _Moved:
    """One memory, and where its bytes are on the host."""

    __slots__ = ("num_bytes", "pieces", "storage")

    def __init__(self, storage: torch.UntypedStorage, pieces: Sequence[Tensor]) -> None:
        self.storage = storage
        self.num_bytes = storage.nbytes()
        self.pieces = pieces

    def copy(self, *, to_host: bool) -> None:
        """Between the two, on the current stream."""
        whole = torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)
        start = 0
        for piece in self.pieces:
            here = whole[start : start + piece.numel()]
            target, source = (piece, here) if to_host else (here, piece)
            target.copy_(source, non_blocking=True)
            start += piece.numel()


class OffloadedLayers:
    """What chosen layers of one work save, on its way to the host and back.

    Called in this order: :meth:`keeping` around forwards, :meth:`copy_out`, :meth:`release`,
    :meth:`take_again`, :meth:`copy_back`, :meth:`wait` and, behind the backward, :meth:`end`.

    Args:
        offloader: That of the rank.
        layers: Numbers in the module, from 0.
    """

    def __init__(self, offloader: Offloader, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.stored: StoredBytes | None = None
        """Counts what is kept, where that is wanted."""
        self._offloader = offloader
        self._kept: list[weakref.ref[_Kept]] = []
        self._moved: list[_Moved] = []
        self._blocks: list[Tensor] = []
        self._is_away = False
        self._copied: torch.cuda.Event | None = None
        """The end of the last copy."""

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Around the forward of one of the layers: what it saves can be moved."""
        with saving(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, None if self.stored is None else self.stored.keep(tensor))
        # Weights stay, and types of other packages manage their memory themselves.
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            self._kept.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: _Kept) -> Tensor:
        if self._is_away:
            raise PlanError("its activations are on the host: the plan has no RELOAD before it")
        # Autograd compares versions only of what it keeps without hooks.
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor of shape {list(kept.tensor.shape)} that backward needs was changed in "
                f"place: it is at version {kept.tensor._version} (expected {kept.version})"
            )
        return kept.tensor

    def copy_out(self, also_held: Iterable[Tensor]) -> None:
        """Begin to copy all memory that nobody else holds to the host, on the current stream.

        Args:
            also_held: Tensors whose holders do not read them before the backward of this work.
        """
        storages = self._own_storages(also_held)
        self._blocks, pieces = self._offloader.take([one.nbytes() for one in storages])
        self._moved = [_Moved(*pair) for pair in zip(storages, pieces, strict=False)]
        for one in self._moved:
            one.copy(to_host=True)
            self._offloader.moved_bytes += one.num_bytes
        self._copied = self._offloader.event()

    def _own_storages(self, also_held: Iterable[Tensor]) -> list[torch.UntypedStorage]:
        """Of all that is kept, what nobody else holds."""
        kept = [one.tensor for one in (ref() for ref in self._kept) if one is not None]
        self._kept.clear()
        known = {id(one): one for one in (*kept, *also_held)}.values()
        num_known = Counter(one.untyped_storage()._cdata for one in known)
        storages = {one._cdata: one for one in (tensor.untyped_storage() for tensor in kept)}
        return [
            storage
            for address, storage in storages.items()
            if storage.device == self._offloader.place
            and storage.nbytes()
            and storage.resizable()
            # One more than its tensors: the handle of it here.
            and torch._C._storage_Use_Count(address) == num_known[address] + 1
        ]

    def wait(self) -> None:
        """Let the current stream wait for the last copy."""
        self._offloader.wait(self._copied)

    def release(self) -> None:
        """Empty the memory, which the current stream must have waited for."""
        self._is_away = True
        for one in self._moved:
            one.storage.resize_(0)
            if self.stored is not None:
                self.stored.leave(one.storage, one.num_bytes)

    def take_again(self) -> None:
        """Take memory for all that was moved, in the order of the current stream."""
        for one in self._moved:
            one.storage.resize_(one.num_bytes)
            if self.stored is not None:
                self.stored.come_back(one.storage, one.num_bytes)

    def copy_back(self) -> None:
        """Begin to copy all that was moved back, on the current stream."""
        for one in self._moved:
            one.copy(to_host=False)
        self._copied = self._offloader.event()
        self._is_away = False

    def end(self) -> None:
        """Hand back the memory of the host; the current stream must have waited for the copies."""
        self._offloader.blocks.give(self._blocks)
        self._blocks, self._moved = [], []
