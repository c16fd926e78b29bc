"""Rules for the list scheduler: keys, whose turn it is, and what may be admitted.

What depends on the batch alone is made once; a search makes many rules from it.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner.kernels import Rules, new_state
from megatron_dip.simulator.arrays import (
    BACKWARD_KIND,
    FORWARD_KIND,
    FloatArray,
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

    Args:
        table: The batch.
        stored_bytes: [N] what every work is taken to hold.

    Raises:
        InfeasibleError: A single microbatch does not fit; the message says where, what is missing
            and what would help.
    """

    def __init__(self, table: TaskTable, stored_bytes: IntArray) -> None:
        limits = table.graph.problem.memory_limit_bytes
        self.stored_bytes = stored_bytes
        self._needs = np.zeros(
            (table.num_ranks, table.graph.problem.num_microbatches), dtype=np.int64
        )
        np.add.at(self._needs, (table.rank, table.microbatch), stored_bytes)
        self._free = np.array(limits, dtype=np.int64) - table.static_bytes
        for rank, index in np.argwhere(self._free[:, None] < self._needs)[:1].tolist():
            is_reduced = bool((stored_bytes < table.stored_bytes).any())
            raise InfeasibleError(self._explain(table, rank, index, is_reduced))
        self.is_guarded = self._needs.sum(axis=1) > self._free

    def _explain(self, table: TaskTable, rank: int, index: int, is_reduced: bool) -> str:
        limit = table.graph.problem.memory_limit_bytes[rank]
        static = int(table.static_bytes[rank])
        need = static + int(self._needs[rank, index])
        if static > limit:
            return (
                f"rank {rank}: its weights alone take {static} bytes (limit {limit}, "
                f"{static - limit} missing: use more ranks or a higher limit)"
            )
        how = ", with all of its layers recomputed" if is_reduced else ""
        return (
            f"rank {rank}: microbatch {index} needs {need} bytes with the weights{how} (limit "
            f"{limit}, {need - limit} missing: use smaller microbatches, more ranks or a higher "
            f"limit)"
        )

    def slack_bytes(self, microbatch_order: IntArray) -> IntArray:
        """[num_ranks, M], by place in ``microbatch_order``, before anything has started."""
        return self._free[:, None] - self._needs[:, microbatch_order]


class BatchRules:
    """What all rules of one batch have in common, for time running forwards or backwards."""

    def __init__(
        self,
        table: TaskTable,
        graph: TaskGraph,
        opening_kind: int,
        levels: Sequence[IntArray],
    ) -> None:
        self.table = table
        self.graph = graph
        self.opening_kind = opening_kind
        self.stages, self.stage = np.unique(table.stage, return_inverse=True)
        self.microbatch = table.microbatch
        self._guards = [MemoryGuard(table, level) for level in levels]
        self._sources = np.flatnonzero(graph.exists & (graph.num_inputs == 0))
        self._source_stage = self.stage[self._sources % table.num_works]
        counts = np.bincount(self._source_stage, minlength=len(self.stages))
        self._first_source = np.concatenate([[0], np.cumsum(counts)])
        self._num_left = np.zeros(
            (len(self.stages), table.graph.problem.num_microbatches), dtype=np.int64
        )
        np.add.at(self._num_left, (self.stage, self.microbatch), 1)
        self.state = new_state(graph, table.num_ranks, self._num_left)
        """Of the schedule that is being made: one at a time."""

    @classmethod
    def forwards(
        cls, table: TaskTable, *, split_backward: bool, levels: Sequence[IntArray] | None = None
    ) -> Self:
        """Time runs forwards.

        Args:
            table: The batch.
            split_backward: Input and weight gradients apart.
            levels: [N] each, what works may be taken to hold when they are admitted; what they do
                hold where it is None, and no memory limit where it is empty.

        Raises:
            InfeasibleError: A single microbatch does not fit.
        """
        levels = [table.stored_bytes] if levels is None else levels
        graph = table.split if split_backward else table.whole
        return cls(table, graph, FORWARD_KIND, levels)

    @classmethod
    def backwards(cls, table: TaskTable, levels: Sequence[IntArray]) -> Self:
        """Time runs backwards, with whole backwards; see :meth:`forwards`."""
        return cls(table, reverse_graph(table.whole), BACKWARD_KIND, levels)

    def rank_of(self, task: int) -> int:
        """The rank that runs ``task``."""
        return int(self.graph.rank[task % len(self.graph.rank)])

    def make(
        self,
        key: FloatArray | IntArray,
        turn: int,
        microbatch_order: IntArray,
        in_flight_limit: IntArray | None = None,
        level: int = 0,
    ) -> Rules:
        """The rules with these preferences.

        Args:
            key: [3 N] smaller goes first.
            turn: ALTERNATE, CLOSERS_FIRST or BY_KEY.
            microbatch_order: [M] in which microbatches enter, and in which memory is set aside.
            in_flight_limit: [S] see :class:`Rules`; no limits where it is None.
            level: Which of the levels works are admitted by.
        """
        place = np.empty(len(microbatch_order), dtype=np.int64)
        place[microbatch_order] = np.arange(len(place))
        work_place = place[self.microbatch]
        num_works = len(work_place)
        by_offer = np.lexsort(
            (key[self._sources], work_place[self._sources % num_works], self._source_stage)
        )
        stored_bytes = self.table.stored_bytes
        if not self._guards:
            slack = np.zeros((self.table.num_ranks, len(place)), dtype=np.int64)
            is_guarded = np.zeros(self.table.num_ranks, dtype=bool)
        else:
            guard = self._guards[level]
            stored_bytes = guard.stored_bytes
            slack = guard.slack_bytes(microbatch_order)
            is_guarded = guard.is_guarded
        if in_flight_limit is None:
            in_flight_limit = np.full(len(self.stages), -1, dtype=np.int64)
        return Rules(
            key=np.asarray(key, dtype=np.float64),
            turn=turn,
            opening_kind=self.opening_kind,
            stage=self.stage,
            first_source=self._first_source,
            source=self._sources[by_offer],
            stored_bytes=stored_bytes,
            place=work_place,
            slack_bytes=slack,
            is_guarded=is_guarded,
            microbatch=self.microbatch,
            in_flight_limit=in_flight_limit,
            num_left=self._num_left,
        )
