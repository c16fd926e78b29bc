"""Packing: the samples of an epoch, shuffled, become sequences of at most ``seq_length`` tokens.

Best fit over a few open sequences: a sample goes into the fullest one that has room for it; when
there is none and as many as allowed are open, the oldest is closed.  ``separation`` is the share
of samples that are packed only with their own kind (with images, or text only): 0 mixes all,
which makes sequences alike; 1 gives sequences of one kind only, which makes them differ most.
Everything is a pure function of its arguments.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dip.errors import DataError

__all__ = ["PackedEpochs", "PackingOptions", "pack_epoch"]

_FREE, _WITH_IMAGES, _TEXT_ONLY = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How samples are put together."""

    separation: float = 0.5
    """Share of samples packed only with their own kind, between 0 and 1."""
    num_open: int = 8
    """Sequences of a kind that are open at a time: more pack tighter and take longer."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.separation <= 1.0:
            raise DataError(f"separation is {self.separation}; expected a share between 0 and 1")
        if self.num_open < 1:
            raise DataError(f"num_open is {self.num_open}; expected at least 1")


class _Open:
    """A sequence that still takes samples."""

    __slots__ = ("free", "samples")

    def __init__(self, free: int) -> None:
        self.free = free
        self.samples: list[int] = []


def pack_epoch(
    lengths: Sequence[int],
    has_images: Sequence[bool],
    *,
    seq_length: int,
    seed: int,
    epoch: int,
    options: PackingOptions,
) -> tuple[tuple[int, ...], ...]:
    """Pack every sample exactly once.

    Args:
        lengths: Tokens of each sample, images included, each between 1 and ``seq_length``.
        has_images: Per sample, whether it holds images.

    Returns:
        The sequences in training order; each names the places of its samples in ``lengths``.

    Raises:
        DataError: A sample is longer than ``seq_length``.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths)).tolist()
    strict = (random.random(len(lengths)) < options.separation).tolist()
    opened: dict[int, list[_Open]] = {_FREE: [], _WITH_IMAGES: [], _TEXT_ONLY: []}
    closed: list[_Open] = []
    for sample in order:
        length = lengths[sample]
        if length > seq_length:
            raise DataError(
                f"sample {sample} has {length} tokens, longer than the sequence length {seq_length}"
            )
        kind = (_WITH_IMAGES if has_images[sample] else _TEXT_ONLY) if strict[sample] else _FREE
        candidates = opened[kind]
        target = min(
            (sequence for sequence in candidates if sequence.free >= length),
            key=lambda sequence: sequence.free,
            default=None,
        )
        if target is None:
            if len(candidates) == options.num_open:
                closed.append(candidates.pop(0))
            target = _Open(seq_length)
            candidates.append(target)
        target.samples.append(sample)
        target.free -= length
    closed += [sequence for kind in sorted(opened) for sequence in opened[kind]]
    # The last ones would otherwise be the emptiest, and sorted by kind.
    places = random.permutation(len(closed)).tolist()
    return tuple(tuple(closed[place].samples) for place in places)


class PackedEpochs:
    """The sequences of epoch after epoch; an epoch is packed when it is first asked for.

    Args:
        pack: Makes the sequences of an epoch, each the places of its samples.
    """

    def __init__(self, pack: Callable[[int], tuple[tuple[int, ...], ...]]) -> None:
        self._make = pack
        self._ends: list[int] = []
        self._packed: dict[int, tuple[tuple[int, ...], ...]] = {}

    @property
    def first_length(self) -> int:
        """Sequences of the first epoch."""
        return len(self._pack(0))

    def place(self, i: int) -> tuple[int, tuple[int, ...]]:
        """The epoch of sequence ``i``, and its samples."""
        while not self._ends or self._ends[-1] <= i:
            count = len(self._pack(len(self._ends)))
            self._ends.append(count + (self._ends[-1] if self._ends else 0))
        epoch = bisect_right(self._ends, i)
        start = self._ends[epoch - 1] if epoch else 0
        return epoch, self._pack(epoch)[i - start]

    def _pack(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        if epoch not in self._packed:
            # Two epochs are in use at a time at most: where one ends and the next begins.
            self._packed = {e: p for e, p in self._packed.items() if abs(e - epoch) <= 1}
            self._packed[epoch] = self._make(epoch)
        return self._packed[epoch]
