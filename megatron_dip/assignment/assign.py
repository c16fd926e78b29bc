"""The assignment of a global batch: which group of items goes to which replica and microbatch.

Replicas are evened out first: by exchanging whole microbatches, and, where that leaves one too far
above the mean, single groups.  Then the microbatches of every replica are, so that each has about
the same work of every module.  What is near enough is left alone, so that little moves.

The result depends on the groups and their order alone: every rank that knows the sizes of a batch
finds the same one.  It is a descent: it ends where no exchange of a pair helps, which need not be
the best assignment there is.  Times are those of items; overheads per call are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.assignment.groups import Groups
from megatron_dip.assignment.kernels import even_out
from megatron_dip.assignment.pool import Pool, new_pool, new_scratch, place_sums
from megatron_dip.errors import ConfigError
from megatron_dip.simulator.arrays import FloatArray, IntArray

__all__ = ["Assignment", "Limits", "Moved", "Spread", "assign", "measure_spread"]

TOLERANCE = 0.003
"""Of the mean time of a replica: what the slowest may be above it, in every measure."""
MICROBATCH_TOLERANCE = 0.02
"""Of the mean time of a microbatch: what one may be off, in every measure."""
_LEAST_GAIN = 0.25
"""Of a tolerance: what moves loads by less is not done."""
_MOST_ROUNDS = 2
"""Of evening out: places that could not be improved are tried again after all others."""
_NO_BYTE_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a microbatch may hold; None: as much as the one that holds most now."""

    tokens: Sequence[int | None] | None = None
    """Per module."""
    kept_bytes: int | None = None


class Moved(NamedTuple):
    """What changes its place."""

    groups: int
    items: int
    num_bytes: int


class Assignment(NamedTuple):
    """Where every group goes."""

    replica: IntArray
    """[G]"""
    microbatch: IntArray
    """[G]: of its replica."""
    between: Moved
    """To another replica."""
    within: Moved
    """To another microbatch of the same replica."""


class Spread(NamedTuple):
    """How unequal the parts of a batch are."""

    slowest: float
    """Time of the slowest over the mean, 1 or more."""
    slowest_modules: tuple[float, ...]
    """The same of every module by itself; 1 where it has no work."""
    deviation: float
    """Standard deviation of times over their mean."""


def assign(
    groups: Groups,
    num_microbatches: Sequence[int],
    *,
    limits: Limits | None = None,
    between: bool = True,
    within: bool = True,
    tolerance: float = TOLERANCE,
    microbatch_tolerance: float = MICROBATCH_TOLERANCE,
) -> Assignment:
    """Even out replicas, then the microbatches of each.

    Args:
        groups: The global batch, as it is.
        num_microbatches: Of every replica; stays so, and none becomes empty.
        limits: Of a microbatch.
        between: Whether groups may go to other replicas.
        within: Whether they may go to other microbatches of their replica.
        tolerance: Of the mean time of a replica, see ``TOLERANCE``.
        microbatch_tolerance: Of the mean time of a microbatch, see ``MICROBATCH_TOLERANCE``.

    Raises:
        ConfigError: A tolerance is negative, or a microbatch holds more than a limit to begin with.
        ValueError: A group is in a microbatch that there is not.
    """
    for name, value in (("tolerance", tolerance), ("microbatch_tolerance", microbatch_tolerance)):
        if not value >= 0:
            raise ConfigError(f"{name} {value} (expected 0 or more)")
    slots = _Slots(groups, num_microbatches, limits or Limits())
    if between and len(num_microbatches) > 1:
        slots.even_out_replicas(tolerance)
    if within:
        for number in range(len(num_microbatches)):
            slots.even_out_microbatches(number, microbatch_tolerance)
    replica = slots.replica_of[slots.slot]
    return Assignment(
        replica,
        slots.slot - slots.first_slot[replica],
        _moved(groups, replica != groups.replica),
        _moved(groups, (replica == groups.replica) & (slots.slot != slots.given)),
    )


def measure_spread(
    time_us: FloatArray, places: IntArray | Sequence[int], num_places: int
) -> Spread:
    """How far places differ; ``time_us`` [G, D] and ``places`` [G] of groups."""
    loads = np.zeros((num_places, time_us.shape[1]))
    np.add.at(loads, np.asarray(places, dtype=np.int64), time_us)
    total = loads.sum(axis=1)
    mean = float(total.mean())

    def over_mean(values: FloatArray) -> float:
        return float(values.max() / values.mean()) if values.any() else 1.0

    return Spread(
        over_mean(total),
        tuple(over_mean(loads[:, module]) for module in range(loads.shape[1])),
        float(total.std() / mean) if mean else 0.0,
    )


def _moved(groups: Groups, is_moved: NDArray[np.bool_]) -> Moved:
    return Moved(
        int(is_moved.sum()),
        int(groups.num_items[is_moved].sum()),
        int(groups.moved_bytes[is_moved].sum()),
    )


class _Slots:
    """Groups in the microbatches of all replicas, numbered through."""

    def __init__(self, groups: Groups, num_microbatches: Sequence[int], limits: Limits) -> None:
        counts = np.array(num_microbatches, dtype=np.int64)
        is_there = (groups.replica < len(counts)) & (
            groups.microbatch < counts[np.minimum(groups.replica, len(counts) - 1)]
        )
        if not is_there.all():
            wrong = int(np.flatnonzero(~is_there)[0])
            raise ValueError(
                f"group {wrong} is in microbatch {groups.microbatch[wrong]} of replica "
                f"{groups.replica[wrong]} (expected one of {list(num_microbatches)} microbatches)"
            )
        self.first_slot = np.concatenate([[0], np.cumsum(counts)])
        self.replica_of = np.repeat(np.arange(len(counts)), counts)
        self.given = self.first_slot[groups.replica] + groups.microbatch
        self.slot = self.given.copy()
        self.groups = groups
        self.load_us = np.column_stack([groups.time_us, _row_sums(groups.time_us)])
        self.limits = self._checked(limits)

    def _checked(self, limits: Limits) -> tuple[IntArray, int]:
        """Limits per module and of bytes, which all microbatches keep."""
        num_slots = len(self.replica_of)
        held = place_sums(self.groups.tokens, self.slot, num_slots)
        kept = place_sums(self.groups.kept_bytes, self.slot, num_slots)
        tokens = held.max(axis=0, initial=0)
        for module, limit in enumerate(limits.tokens or ()):
            if limit is not None:
                self._check(held[:, module], limit, f"tokens of module {module}")
                tokens[module] = limit
        if limits.kept_bytes is None:
            return tokens, int(kept.max(initial=0))
        self._check(kept, limits.kept_bytes, "bytes")
        return tokens, limits.kept_bytes

    def _check(self, held: IntArray, limit: int, what: str) -> None:
        slot = int(held.argmax())
        if held[slot] > limit:
            replica = int(self.replica_of[slot])
            raise ConfigError(
                f"microbatch {slot - self.first_slot[replica]} of replica {replica} holds "
                f"{held[slot]} {what} (limit {limit}: give one that the batch keeps)"
            )

    def even_out_replicas(self, tolerance: float) -> None:
        """Exchange whole microbatches, then single groups if that is not enough."""
        mean_us = self.load_us[:, -1].sum() / (len(self.first_slot) - 1)
        num_slots = len(self.replica_of)
        whole = new_pool(
            load_us=place_sums(self.load_us, self.slot, num_slots),
            tokens=place_sums(self.groups.tokens, self.slot, num_slots),
            kept_bytes=place_sums(self.groups.kept_bytes, self.slot, num_slots),
            slot=np.arange(num_slots),
            first_slot=self.first_slot,
            limits=self.limits,
        )
        _descend(whole, tolerance * mean_us, is_within=False)
        self.slot = whole.slot[self.slot]
        pool = new_pool(
            load_us=self.load_us,
            tokens=self.groups.tokens,
            kept_bytes=self.groups.kept_bytes,
            slot=self.slot,
            first_slot=self.first_slot,
            limits=self.limits,
        )
        _descend(pool, tolerance * mean_us, is_within=False)
        self.slot = pool.slot

    def even_out_microbatches(self, replica: int, tolerance: float) -> None:
        """Exchange groups of the microbatches of one replica."""
        first, end = self.first_slot[replica], self.first_slot[replica + 1]
        own = np.flatnonzero((self.slot >= first) & (self.slot < end))
        pool = new_pool(
            load_us=self.load_us[own],
            tokens=self.groups.tokens[own],
            kept_bytes=self.groups.kept_bytes[own],
            slot=self.slot[own] - first,
            first_slot=np.arange(end - first + 1),
            limits=self.limits,
        )
        mean_us = pool.load_us[:, -1].sum() / max(1, end - first)
        _descend(pool, tolerance * mean_us, is_within=True)
        self.slot[own] = first + pool.slot


def _descend(pool: Pool, tolerance_us: float, is_within: bool) -> None:
    scratch = new_scratch(pool)
    largest_first = np.argsort(-pool.size, kind="stable")
    least_gain = (_LEAST_GAIN * tolerance_us) ** 2
    for _ in range(_MOST_ROUNDS):
        if not even_out(pool, scratch, largest_first, tolerance_us, least_gain, is_within):
            return


def _row_sums(values: FloatArray) -> FloatArray:
    total = np.zeros(len(values))
    for column in values.T:
        total = total + column
    return total
