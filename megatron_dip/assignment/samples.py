"""Samples known by the sizes of their items, assigned to the slots of replicas.

A *slot* is what is filled with samples: a microbatch, or a packed sequence of one.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from megatron_dip.assignment.assign import Limits, assign, measure_spread
from megatron_dip.assignment.groups import Groups, batch_groups
from megatron_dip.costs import ItemSizes, ProblemBuilder
from megatron_dip.report.steps import AssignmentRecord
from megatron_dip.simulator.arrays import FloatArray, IntArray

__all__ = ["GroupCosts", "SlotFiller"]


class GroupCosts(NamedTuple):
    """Of G groups of samples, with D modules."""

    time_us: FloatArray
    """[G, D]"""
    tokens: IntArray
    """[G, D]"""
    kept_bytes: IntArray
    """[G]: from forward to backward."""

    def __len__(self) -> int:
        return len(self.kept_bytes)

    def joined(self, groups: Sequence[Sequence[int]]) -> "GroupCosts":
        """Of larger groups, each of some of these, at least one."""
        numbers = np.fromiter(chain.from_iterable(groups), dtype=np.int64)
        starts = np.cumsum([0, *map(len, groups)])[:-1]
        return GroupCosts(*(np.add.reduceat(values[numbers], starts) for values in self))


class SlotFiller:
    """Fills slots so that those of a replica, and replicas, have alike work.

    Args:
        builder: Of the problems of the run.  What it has measured should not be in it: whoever
            fills the same slots must find the same.
    """

    def __init__(self, builder: ProblemBuilder) -> None:
        self._builder = builder
        self._rows: dict[Hashable, int] = {}
        """By the sizes of a sample, its place among the costs that are known."""
        num_modules = len(builder.model.modules)
        self._known = GroupCosts(
            np.zeros((0, num_modules)),
            np.zeros((0, num_modules), dtype=np.int64),
            np.zeros(0, dtype=np.int64),
        )

    def costs(self, groups: Sequence[Sequence[ItemSizes]]) -> GroupCosts:
        """Of groups of samples that stay together, at least one each, by their sizes."""
        # A global batch of a large run has some 100,000 samples, of few sizes.
        keys = [[_key(sizes) for sizes in group] for group in groups]
        new = {
            key: sizes
            for group, known in zip(groups, keys, strict=True)
            for sizes, key in zip(group, known, strict=True)
            if key not in self._rows
        }
        if new:
            self._learn(new)
        rows = self._rows
        return self._known.joined([[rows[key] for key in group] for group in keys])

    def _learn(self, new: Mapping[Hashable, ItemSizes]) -> None:
        # What does not say what it reads reads all of its microbatch: a sample is one group.
        found, _ = batch_groups([self._builder.build(list(new.values()))])
        assert len(found.replica) == len(new), "a sample falls into parts"
        for key in new:
            self._rows[key] = len(self._rows)
        known = self._known
        self._known = GroupCosts(
            np.concatenate([known.time_us, found.time_us]),
            np.concatenate([known.tokens, found.tokens]),
            np.concatenate([known.kept_bytes, found.kept_bytes]),
        )

    def fill(
        self,
        costs: GroupCosts,
        places: Sequence[int],
        counts: Sequence[int],
        *,
        most_tokens: int | None = None,
        most_groups: int | None = None,
    ) -> list[list[int]]:
        """The groups of every slot, through all replicas; in a slot in the order given.

        Args:
            costs: Of the groups.
            places: Of each, the slot it is in, through all replicas.
            counts: Slots of every replica.
            most_tokens: Of a slot, as items of the module with the loss; None: as many as now.
            most_groups: Of a slot; None: any number.
        """
        starts = np.concatenate([[0], np.cumsum(counts)])
        replica = np.searchsorted(starts, places, side="right") - 1
        num_groups = len(costs)
        ones = np.ones((num_groups, 1), dtype=np.int64)
        found = assign(
            Groups(
                # The last column is no module: it counts.
                time_us=np.hstack([costs.time_us, 0.0 * ones]),
                tokens=np.hstack([costs.tokens, ones]),
                kept_bytes=costs.kept_bytes,
                moved_bytes=np.zeros(num_groups, dtype=np.int64),
                num_items=ones[:, 0],
                replica=replica,
                microbatch=np.array(places) - starts[replica],
            ),
            counts,
            limits=Limits(
                tokens=[
                    *[None] * (len(self._builder.model.modules) - 1),
                    most_tokens,
                    num_groups if most_groups is None else most_groups,
                ]
            ),
        )
        slots: list[list[int]] = [[] for _ in range(starts[-1])]
        for group, slot in enumerate((starts[found.replica] + found.microbatch).tolist()):
            slots[slot].append(group)
        return slots

    def record(
        self,
        costs: GroupCosts,
        places: Sequence[int],
        slots: Sequence[Sequence[int]],
        counts: Sequence[int],
    ) -> AssignmentRecord:
        """What it changes that the groups are in these ``slots``, which are microbatches."""
        before, after = np.array(places), np.zeros(len(costs), dtype=np.int64)
        for slot, content in enumerate(slots):
            after[list(content)] = slot
        replica_of = np.repeat(np.arange(len(counts)), counts)

        def slowest(places: IntArray, num_places: int) -> float:
            return measure_spread(costs.time_us, places, num_places).slowest

        return AssignmentRecord(
            num_moved=int((before != after).sum()),
            num_groups=len(costs),
            replicas=(
                slowest(replica_of[before], len(counts)),
                slowest(replica_of[after], len(counts)),
            ),
            microbatches=(slowest(before, len(slots)), slowest(after, len(slots))),
        )


def _key(sizes: ItemSizes) -> Hashable:
    return tuple(
        [
            (module, tuple([(one.tokens, one.spans, one.context_tokens) for one in items]))
            for module, items in sizes.items()
        ]
    )
