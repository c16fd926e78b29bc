"""What every search has in common: points, their evaluation, the budget, the best one so far."""

import hashlib
import math
import time
from typing import NamedTuple

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.planner.greedy import GreedySchedule, schedule_greedily
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import IntArray
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Budget", "Evaluator", "Point"]

# Tasks of all schedules that are kept for points that come again: about 100 MB.
_MAX_KEPT_TASKS = 4_000_000


class Budget(NamedTuple):
    """When a search ends: after so many evaluations, or so many milliseconds."""

    evaluations: int | None = None
    milliseconds: float | None = None

    def check(self) -> None:
        """Raise ConfigError unless exactly one of the two is given, positive and finite."""
        given = [limit for limit in self if limit is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise ConfigError(
                f"search budget: {self.evaluations} evaluations, {self.milliseconds} ms "
                f"(expected exactly one of the two, above zero and finite)"
            )


class Point(NamedTuple):
    """What a search chooses; see :meth:`BatchRules.make`."""

    key: IntArray
    turn: int
    microbatch_order: IntArray


class Evaluator:
    """Schedules of one batch, counted and timed; the same point is scheduled once.

    Raises:
        ConfigError: The budget is none.
        InfeasibleError: A single microbatch does not fit into the memory of a rank.
    """

    def __init__(
        self, table: TaskTable, budget: Budget, *, split_backward: bool, goal_us: float
    ) -> None:
        budget.check()
        self.table = table
        self.forwards = BatchRules.forwards(
            table, split_backward=split_backward, has_memory_limit=True
        )
        self.num_evaluations = 0
        self.best: GreedySchedule | None = None
        self._budget = budget
        self._goal_us = goal_us * (1 + 1e-12)
        self._started = time.monotonic()
        self._kept: dict[bytes, GreedySchedule | None] = {}
        self._max_kept = max(1, _MAX_KEPT_TASKS // max(1, int(self.forwards.graph.exists.sum())))

    @property
    def is_over(self) -> bool:
        """The budget is spent, or nothing better can be found; never before a first schedule."""
        if self.best is None:
            return False
        if self.best.makespan_us <= self._goal_us:
            return True
        if self._budget.evaluations is not None:
            return self.num_evaluations >= self._budget.evaluations
        limit_ms = self._budget.milliseconds or 0.0
        return (time.monotonic() - self._started) * 1000 >= limit_ms

    def evaluate(self, point: Point) -> GreedySchedule:
        """The schedule of ``point`` with time running forwards; the best one is remembered.

        A point that comes again counts as an evaluation, so that a search over few points ends.
        """
        schedule = self.schedule(self.forwards, point)
        assert schedule is not None, "the memory guard leaves no schedule unfinished"
        if self.best is None or schedule.makespan_us < self.best.makespan_us:
            self.best = schedule
        return schedule

    def schedule(self, batch: BatchRules, point: Point) -> GreedySchedule | None:
        """The schedule of ``point`` under the rules of ``batch``; None where it cannot finish."""
        self.num_evaluations += 1
        digest = hashlib.blake2b(point.key.tobytes(), digest_size=16)
        digest.update(point.microbatch_order.tobytes())
        digest.update(bytes([point.turn, batch.opening_kind]))
        name = digest.digest()
        if name not in self._kept:
            if len(self._kept) >= self._max_kept:
                del self._kept[next(iter(self._kept))]
            try:
                self._kept[name] = schedule_greedily(batch, batch.make(*point))
            except InfeasibleError:
                self._kept[name] = None
        return self._kept[name]
