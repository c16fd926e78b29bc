"""Orders in which some tasks come in a fixed order and all others fill the gaps between them.

Every rank runs its fixed tasks in their order, each as soon as it can.  Where the next one cannot
start yet, the rank takes the best of its other tasks that can; what it has begun it finishes, so
that the next fixed task may start that much later.

How much may be in flight can be limited: works are grouped into *holders*, holders into *pools*,
and a pool has at most ``max_held`` holders between their first forward and their last task.
Holders of a pool begin in the order of their numbers, so that an old one never waits for a young
one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_dip.simulator.arrays import IntArray, TaskGraph, TaskOrder

__all__ = ["InFlightLimit", "fill_gaps"]


class InFlightLimit(NamedTuple):
    """N works, H holders."""

    holder: IntArray
    """[N]: of every work; -1 for works that are not limited."""
    pool: IntArray
    """[H]"""
    max_held: int


def fill_gaps(
    graph: TaskGraph,
    fixed: Sequence[Sequence[int]],
    key: IntArray,
    limit: InFlightLimit | None = None,
) -> TaskOrder:
    """The order of all tasks of ``graph``.

    Args:
        graph: The batch.
        fixed: Per rank, the tasks that have a fixed order.
        key: [3 N]: among other tasks, the smaller one goes first.
        limit: What may be in flight; everything where it is None.
    """
    return _Filling(graph, fixed, key, limit).order()


class _Filling:
    def __init__(
        self,
        graph: TaskGraph,
        fixed: Sequence[Sequence[int]],
        key: IntArray,
        limit: InFlightLimit | None,
    ) -> None:
        num_ranks = len(fixed)
        self._num_works = len(graph.rank)
        self._num_tasks = int(graph.exists.sum())
        self._rank = np.tile(graph.rank, 3).tolist()
        self._duration_us = graph.duration_us.tolist()
        self._key = key.tolist()
        ends = zip(graph.first_output[:-1].tolist(), graph.first_output[1:].tolist(), strict=True)
        output, delay_us = graph.output.tolist(), graph.delay_us.tolist()
        self._outputs = [
            list(zip(output[first:end], delay_us[first:end], strict=True)) for first, end in ends
        ]
        self._num_waiting = graph.num_inputs.tolist()
        self._ready_us = [0.0] * len(graph.exists)
        self._free_us = [0.0] * num_ranks
        self._steps = [list(tasks)[::-1] for tasks in fixed]
        self._is_fixed = np.zeros(len(graph.exists), dtype=bool)
        self._is_fixed[[task for tasks in fixed for task in tasks]] = True
        self._fillers: list[list[int]] = [[] for _ in range(num_ranks)]
        for task in np.flatnonzero(graph.exists & (graph.num_inputs == 0) & ~self._is_fixed):
            self._fillers[self._rank[task]].append(int(task))
        nothing = np.full(self._num_works, -1, dtype=np.int64)
        self._in_flight = _InFlight(graph, limit or InFlightLimit(nothing, nothing[:0], 0))

    def order(self) -> TaskOrder:
        """Again and again what can start first, over all ranks."""
        num_ranks = len(self._free_us)
        lines: list[list[int]] = [[] for _ in range(num_ranks)]
        heads = [self._next(rank) for rank in range(num_ranks)]
        for _ in range(self._num_tasks):
            (start_us, task), rank = min((head, rank) for rank, head in enumerate(heads))
            assert start_us < np.inf, "the fixed order cannot run"
            lines[rank].append(task)
            for touched in self._run(rank, task, start_us):
                heads[touched] = self._next(touched)
        first = np.cumsum([0, *map(len, lines)])
        return TaskOrder(np.array([task for line in lines for task in line]), first)

    def _next(self, rank: int) -> tuple[float, int]:
        """When the next task of a rank can start, and which one it is."""
        free_us = self._free_us[rank]
        best_us, best = np.inf, -1
        if self._steps[rank]:
            step = self._steps[rank][-1]
            if not self._num_waiting[step] and self._in_flight.admits(step):
                best_us, best = max(free_us, self._ready_us[step]), step
        for task in self._fillers[rank]:
            start_us = max(free_us, self._ready_us[task])
            # A fixed task wins ties; among others the key decides.
            is_better = start_us < best_us or (
                start_us == best_us
                and not self._is_fixed[best]
                and self._key[task] < self._key[best]
            )
            if is_better and self._in_flight.admits(task):
                best_us, best = start_us, task
        return best_us, best

    def _run(self, rank: int, task: int, start_us: float) -> set[int]:
        """Start a task; returns the ranks that may go on differently now."""
        touched = {rank}
        end_us = start_us + self._duration_us[task]
        self._free_us[rank] = end_us
        if self._is_fixed[task]:
            self._steps[rank].pop()
        else:
            self._fillers[rank].remove(task)
        self._in_flight.count(task)
        for other, delay_us in self._outputs[task]:
            self._num_waiting[other] -= 1
            self._ready_us[other] = max(self._ready_us[other], end_us + delay_us)
            if not self._num_waiting[other]:
                touched.add(self._rank[other])
                if not self._is_fixed[other]:
                    self._fillers[self._rank[other]].append(other)
        return touched


class _InFlight:
    """Which holders are open; pools are of one rank, so that a rank's own tasks change them."""

    def __init__(self, graph: TaskGraph, limit: InFlightLimit) -> None:
        self._num_works = len(graph.rank)
        self._holder = np.tile(limit.holder, 3).tolist()
        self._pool = limit.pool.tolist()
        self._max_held = limit.max_held
        limited = graph.exists & (np.tile(limit.holder, 3) >= 0)
        self._num_left = np.bincount(
            np.tile(limit.holder, 3)[limited], minlength=len(limit.pool)
        ).tolist()
        self._is_open = [False] * len(self._pool)
        self._num_open = [0] * (max(self._pool, default=-1) + 1)
        self._waiting: list[list[int]] = [[] for _ in self._num_open]
        for holder in np.unique(limit.holder[limit.holder >= 0])[::-1].tolist():
            self._waiting[self._pool[holder]].append(holder)

    def admits(self, task: int) -> bool:
        """Whether ``task`` may start now."""
        holder = self._holder[task]
        if task >= self._num_works or holder < 0 or self._is_open[holder]:
            return True
        pool = self._pool[holder]
        return self._num_open[pool] < self._max_held and self._waiting[pool][-1] == holder

    def count(self, task: int) -> None:
        """``task``, which is admitted, runs."""
        holder = self._holder[task]
        if holder < 0:
            return
        pool = self._pool[holder]
        if not self._is_open[holder]:
            self._is_open[holder] = True
            self._num_open[pool] += 1
            self._waiting[pool].pop()
        self._num_left[holder] -= 1
        if not self._num_left[holder]:
            self._num_open[pool] -= 1
