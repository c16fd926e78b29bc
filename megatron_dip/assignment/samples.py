"""Samples known by the sizes of their items, assigned to the slots of replicas.

A *slot* is what is filled with samples: a microbatch, or a packed sequence of one.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_dip.assignment.assign import Limits, assign, measure_spread
from megatron_dip.assignment.groups import Groups, batch_groups
from megatron_dip.costs import ItemSizes, ProblemBuilder
from megatron_dip.report.steps import AssignmentRecord
from megatron_dip.simulator.arrays import FloatArray, IntArray

__all__ = ["SlotFiller"]


class _Costs(NamedTuple):
    """Of a group: time and tokens per module, and what it keeps from forward to backward."""

    time_us: FloatArray
    tokens: IntArray
    kept_bytes: int


class SlotFiller:
    """Fills slots so that those of a replica, and replicas, have alike work.

    Args:
        builder: Of the problems of the run.  What it has measured should not be in it: whoever
            fills the same slots must find the same.
    """

    def __init__(self, builder: ProblemBuilder) -> None:
        self._builder = builder
        self._known: dict[Hashable, _Costs] = {}
        """By the sizes of a sample."""

    def fill(
        self,
        groups: Sequence[Sequence[ItemSizes]],
        places: Sequence[int],
        counts: Sequence[int],
        *,
        most_tokens: int | None = None,
        most_groups: int | None = None,
    ) -> list[list[int]]:
        """The groups of every slot, through all replicas; in a slot in the order given.

        Args:
            groups: Samples that stay together, by their sizes.
            places: Of each, the slot it is in, through all replicas.
            counts: Slots of every replica.
            most_tokens: Of a slot, as items of the module with the loss; None: as many as now.
            most_groups: Of a slot; None: any number.
        """
        costs = self._costs(groups)
        starts = np.concatenate([[0], np.cumsum(counts)])
        replica = np.searchsorted(starts, places, side="right") - 1
        found = assign(
            Groups(
                # The last column is no module: it counts.
                time_us=np.array([[*cost.time_us, 0.0] for cost in costs]),
                tokens=np.array([[*cost.tokens, 1] for cost in costs]),
                kept_bytes=np.array([cost.kept_bytes for cost in costs]),
                moved_bytes=np.zeros(len(groups), dtype=np.int64),
                num_items=np.ones(len(groups), dtype=np.int64),
                replica=replica,
                microbatch=np.array(places) - starts[replica],
            ),
            counts,
            limits=Limits(
                tokens=[
                    *[None] * (len(self._builder.model.modules) - 1),
                    most_tokens,
                    len(groups) if most_groups is None else most_groups,
                ]
            ),
        )
        slots: list[list[int]] = [[] for _ in range(starts[-1])]
        for group, slot in enumerate(starts[found.replica] + found.microbatch):
            slots[slot].append(group)
        return slots

    def record(
        self,
        groups: Sequence[Sequence[ItemSizes]],
        places: Sequence[int],
        slots: Sequence[Sequence[int]],
        counts: Sequence[int],
    ) -> AssignmentRecord:
        """What it changes that the groups are in these ``slots``, which are microbatches."""
        time_us = np.array([cost.time_us for cost in self._costs(groups)])
        before, after = np.array(places), np.zeros(len(groups), dtype=np.int64)
        for slot, content in enumerate(slots):
            after[list(content)] = slot
        replica_of = np.repeat(np.arange(len(counts)), counts)

        def slowest(places: IntArray, num_places: int) -> float:
            return measure_spread(time_us, places, num_places).slowest

        return AssignmentRecord(
            num_moved=int((before != after).sum()),
            num_groups=len(groups),
            replicas=(
                slowest(replica_of[before], len(counts)),
                slowest(replica_of[after], len(counts)),
            ),
            microbatches=(slowest(before, len(slots)), slowest(after, len(slots))),
        )

    def _costs(self, groups: Sequence[Sequence[ItemSizes]]) -> list[_Costs]:
        """Of the samples of each group together."""
        keys = [[_key(sizes) for sizes in group] for group in groups]
        new = {
            key: sizes
            for group, known in zip(groups, keys, strict=True)
            for sizes, key in zip(group, known, strict=True)
            if key not in self._known
        }
        if new:
            # What does not say what it reads reads all of its microbatch: a sample is one group.
            costs, _ = batch_groups([self._builder.build(list(new.values()))])
            assert len(costs.replica) == len(new), "a sample falls into parts"
            for key, *row in zip(new, costs.time_us, costs.tokens, costs.kept_bytes, strict=True):
                self._known[key] = _Costs(*row)
        return [_total([self._known[key] for key in group]) for group in keys]


def _total(costs: Sequence[_Costs]) -> _Costs:
    return _Costs(
        np.sum([one.time_us for one in costs], axis=0),
        np.sum([one.tokens for one in costs], axis=0),
        sum(one.kept_bytes for one in costs),
    )


def _key(sizes: ItemSizes) -> Hashable:
    return tuple(
        (module, tuple((one.tokens, one.spans, one.context_tokens) for one in items))
        for module, items in sizes.items()
    )
