"""Rules for the list scheduler: keys, whose turn it is, and what may be admitted.

What depends on the batch alone is made once; a search makes many rules from it.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner.kernels import Rules
from megatron_dip.simulator.arrays import (
    BACKWARD_KIND,
    FORWARD_KIND,
    IntArray,
    TaskGraph,
    reverse_graph,
)
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["BatchRules", "MemoryGuard", "places"]


def places(keys: NDArray[np.generic]) -> IntArray:
    """The place of every key among all, equal ones in their order."""
    found = np.empty(len(keys), dtype=np.int64)
    found[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    return found


class MemoryGuard:
    """Admits a forward only where every microbatch can still be finished within the limits.

    The banker's algorithm, with microbatches in a fixed order: a state is safe if the first
    unfinished microbatch can be computed to its end with what is free, then the next with what
    that gives back, and so on.  Per rank and microbatch i this says: what i and all later ones
    hold, plus what i still has to store, fits the limit.  The slack is what is left of the limit;
    the engine keeps it.  From a safe state the first unfinished microbatch can always go on, so
    that memory never stops a schedule for ever.

    Raises:
        InfeasibleError: A single microbatch does not fit; the message names rank, need and limit.
    """

    def __init__(self, table: TaskTable, microbatch: IntArray) -> None:
        limits = table.graph.problem.memory_limit_bytes
        self._needs = np.zeros(
            (table.num_ranks, table.graph.problem.num_microbatches), dtype=np.int64
        )
        np.add.at(self._needs, (table.rank, microbatch), table.stored_bytes)
        self._free = np.array(limits, dtype=np.int64) - table.static_bytes
        for rank, index in np.argwhere(self._free[:, None] < self._needs)[:1].tolist():
            raise InfeasibleError(
                f"rank {rank}: microbatch {index} needs "
                f"{self._needs[rank, index] + table.static_bytes[rank]} bytes with its weights "
                f"(limit {limits[rank]}: use smaller microbatches or more ranks)"
            )
        self.is_guarded = self._needs.sum(axis=1) > self._free

    def slack_bytes(self, microbatch_order: IntArray) -> IntArray:
        """[num_ranks, M], by place in ``microbatch_order``, before anything has started."""
        return self._free[:, None] - self._needs[:, microbatch_order]


class BatchRules:
    """What all rules of one batch have in common, for time running forwards or backwards."""

    def __init__(
        self, table: TaskTable, graph: TaskGraph, opening_kind: int, guard: MemoryGuard | None
    ) -> None:
        self.table = table
        self.graph = graph
        self.opening_kind = opening_kind
        self._guard = guard
        self.stages, self.stage = np.unique(table.stage, return_inverse=True)
        self.microbatch = table.microbatch
        self._sources = np.flatnonzero(graph.exists & (graph.num_inputs == 0))
        self._source_stage = self.stage[self._sources % table.num_works]
        counts = np.bincount(self._source_stage, minlength=len(self.stages))
        self._first_source = np.concatenate([[0], np.cumsum(counts)])
        self._num_left = np.zeros(
            (len(self.stages), table.graph.problem.num_microbatches), dtype=np.int64
        )
        np.add.at(self._num_left, (self.stage, self.microbatch), 1)

    @classmethod
    def forwards(cls, table: TaskTable, *, split_backward: bool, has_memory_limit: bool) -> Self:
        """Time runs forwards.

        Raises:
            InfeasibleError: There is a memory limit and a single microbatch does not fit.
        """
        guard = MemoryGuard(table, table.microbatch) if has_memory_limit else None
        graph = table.split if split_backward else table.whole
        return cls(table, graph, FORWARD_KIND, guard)

    @classmethod
    def backwards(cls, table: TaskTable) -> Self:
        """Time runs backwards, with whole backwards under the memory limit."""
        guard = MemoryGuard(table, table.microbatch)
        return cls(table, reverse_graph(table.whole), BACKWARD_KIND, guard)

    def rank_of(self, task: int) -> int:
        """The rank that runs ``task``."""
        return int(self.graph.rank[task % len(self.graph.rank)])

    def make(
        self,
        key: IntArray,
        turn: int,
        microbatch_order: IntArray,
        in_flight_limit: IntArray | None = None,
    ) -> Rules:
        """The rules with these preferences.

        Args:
            key: [3 N] smaller goes first, all different.
            turn: ALTERNATE, CLOSERS_FIRST or BY_KEY.
            microbatch_order: [M] in which microbatches enter, and in which memory is set aside.
            in_flight_limit: [S] see :class:`Rules`; no limits where it is None.
        """
        place = np.empty(len(microbatch_order), dtype=np.int64)
        place[microbatch_order] = np.arange(len(place))
        work_place = place[self.microbatch]
        num_works = len(work_place)
        by_offer = np.lexsort(
            (key[self._sources], work_place[self._sources % num_works], self._source_stage)
        )
        if self._guard is None:
            slack = np.zeros((self.table.num_ranks, len(place)), dtype=np.int64)
            is_guarded = np.zeros(self.table.num_ranks, dtype=bool)
        else:
            slack = self._guard.slack_bytes(microbatch_order)
            is_guarded = self._guard.is_guarded
        if in_flight_limit is None:
            in_flight_limit = np.full(len(self.stages), -1, dtype=np.int64)
        return Rules(
            key=key,
            turn=turn,
            opening_kind=self.opening_kind,
            stage=self.stage,
            first_source=self._first_source,
            source=self._sources[by_offer],
            stored_bytes=self.table.stored_bytes,
            place=work_place,
            slack_bytes=slack,
            is_guarded=is_guarded,
            microbatch=self.microbatch,
            in_flight_limit=in_flight_limit,
            num_left=self._num_left,
        )
