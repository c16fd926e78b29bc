"""Serial schedule generation: works are put, one by one, into the first gap that is long enough.

The list scheduler never leaves a rank idle while it has something to do, so a long clip waits
wherever it meets a short one.  Here what comes earlier in a list keeps its time, and what comes
later goes around it (serial generation scheme of project scheduling; Kolisch, "Serial and parallel
resource-constrained project scheduling methods revisited", EJOR 90, 1996).  Memory is not looked
at.
"""

from typing import NamedTuple

import numpy as np

from megatron_dip.compiled import compiled
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder, reverse_graph

__all__ = ["Insertion"]


class _Busy(NamedTuple):
    """When ranks have something to do; T tasks on a rank at most."""

    from_us: FloatArray
    """[num_ranks, T], ascending"""
    until_us: FloatArray
    task: IntArray
    """With what: of those without duration, all at once, what is upstream comes first."""
    length: IntArray
    """[num_ranks]"""


class Insertion:
    """Schedules of one batch with whole backwards, made by insertion.

    Args:
        graph: Who waits for whom; without weight gradients apart.
    """

    def __init__(self, graph: TaskGraph) -> None:
        self._exists = graph.exists
        self._graphs = graph, reverse_graph(graph)
        num_works = len(graph.rank)
        works = np.arange(num_works)
        # Works are numbered upstream first: gradients go to lower numbers.
        forwards = np.concatenate([works, num_works + works[::-1]])
        backwards = np.concatenate([num_works + works, works[::-1]])
        self._sequences = tuple(
            sequence[graph.exists[sequence]] for sequence in (forwards, backwards)
        )
        self._num_ranks = int(graph.rank.max()) + 1
        counts = np.bincount(np.tile(graph.rank, 3)[graph.exists], minlength=self._num_ranks)
        self._longest = int(counts.max())

    def early(self, key_us: FloatArray, duration_us: FloatArray) -> tuple[FloatArray, TaskOrder]:
        """Starts, [3 N], and the order of every rank.

        Smaller keys are inserted first, but nothing before what it waits for.
        """
        starts_us, busy = self._insert(key_us, duration_us, 0)
        first = np.concatenate([[0], np.cumsum(busy.length)])
        lines = [line[:length] for line, length in zip(busy.task, busy.length, strict=True)]
        return starts_us, TaskOrder(np.concatenate(lines), first)

    def late(self, ends_us: FloatArray, duration_us: FloatArray) -> FloatArray:
        """[3 N]: starts counted from the end of the batch, at or below zero: as late as can be.

        What ends last in ``ends_us`` is inserted first.
        """
        starts_us, _ = self._insert(-ends_us, duration_us, 1)
        return -starts_us - duration_us

    def _insert(
        self, key_us: FloatArray, duration_us: FloatArray, direction: int
    ) -> tuple[FloatArray, _Busy]:
        graph, inputs = self._graphs[direction], self._graphs[1 - direction]
        sequence = self._sequences[direction]
        key_us = key_us.copy()
        _delay_keys(graph, sequence, key_us)
        sequence = sequence[np.argsort(key_us[sequence], kind="stable")]
        starts_us = np.zeros(len(duration_us))
        shape = (self._num_ranks, self._longest)
        busy = _Busy(
            np.empty(shape),
            np.empty(shape),
            np.empty(shape, np.int64),
            np.zeros(self._num_ranks, np.int64),
        )
        _insert_all(inputs, sequence, duration_us, busy, starts_us)
        return starts_us, busy


@compiled
def _delay_keys(graph: TaskGraph, sequence: IntArray, key_us: FloatArray) -> None:
    """Nothing gets a smaller key than what it waits for."""
    for task in sequence:
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            other = graph.output[edge]
            key_us[other] = max(key_us[other], key_us[task])


@compiled
def _insert_all(
    inputs: TaskGraph,
    sequence: IntArray,
    duration_us: FloatArray,
    busy: _Busy,
    starts_us: FloatArray,
) -> None:
    """Fill ``starts_us``; ``inputs`` has the edges from every task to those that it waits for."""
    for task in sequence:
        start_us = 0.0
        for edge in range(inputs.first_output[task], inputs.first_output[task + 1]):
            other = inputs.output[edge]
            start_us = max(start_us, starts_us[other] + duration_us[other] + inputs.delay_us[edge])
        rank = inputs.rank[task % len(inputs.rank)]
        low, place = 0, busy.length[rank]
        while low < place:
            middle = (low + place) // 2
            if busy.until_us[rank, middle] <= start_us:
                low = middle + 1
            else:
                place = middle
        end_us = start_us + duration_us[task]
        while place < busy.length[rank] and busy.from_us[rank, place] < end_us:
            start_us = max(start_us, busy.until_us[rank, place])
            end_us = start_us + duration_us[task]
            place += 1
        for later in range(busy.length[rank], place, -1):
            busy.from_us[rank, later] = busy.from_us[rank, later - 1]
            busy.until_us[rank, later] = busy.until_us[rank, later - 1]
            busy.task[rank, later] = busy.task[rank, later - 1]
        busy.from_us[rank, place], busy.until_us[rank, place] = start_us, end_us
        busy.task[rank, place] = task
        busy.length[rank] += 1
        starts_us[task] = start_us
