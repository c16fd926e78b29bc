"""What every search has in common: points, their evaluation, the budget, the best one so far."""

import hashlib
import math
import time
from typing import NamedTuple

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.limits import MOST_BUDGET_MS, MOST_EVALUATIONS
from megatron_dip.planner.greedy import GreedySchedule, Loaned, schedule_greedily
from megatron_dip.planner.memory import Fit, MemoryFitter, memory_levels
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskOrder
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Budget", "Evaluator", "Point", "as_schedule"]

# Tasks of all schedules that are kept for points that come again: about 100 MB.
_MAX_KEPT_TASKS = 4_000_000


class Budget(NamedTuple):
    """When a search ends: after so many evaluations, or so many milliseconds."""

    evaluations: int | None = None
    milliseconds: float | None = None

    def check(self) -> None:
        """Raise ConfigError unless exactly one of the two is given, positive and finite."""
        given = [limit for limit in self if limit is not None]
        most = MOST_BUDGET_MS if self.evaluations is None else MOST_EVALUATIONS
        if len(given) != 1 or not 0 < given[0] <= most:
            raise ConfigError(
                f"search budget: {self.evaluations} evaluations, {self.milliseconds} ms "
                f"(expected exactly one of the two, above zero and finite: at most "
                f"{MOST_EVALUATIONS:,} evaluations, or {MOST_BUDGET_MS:,.0f} ms)"
            )


class Point(NamedTuple):
    """What a search chooses; see :meth:`BatchRules.make`."""

    key: FloatArray | IntArray
    turn: int
    microbatch_order: IntArray
    level: int = 0
    """Which of :attr:`Evaluator.levels` works are admitted by."""
    near: GreedySchedule | None = None
    """Times of backwards are taken from this schedule, and what recomputation counts."""


class Evaluator:
    """Schedules of one batch, counted and timed; the same point is scheduled once.

    Where not everything fits at once, a schedule is made for works that are taken to hold less than
    they do, and what is over the limit is then offloaded or recomputed.

    Args:
        table: The batch, nothing recomputed.
        budget: When :attr:`is_over`.
        split_backward: Input and weight gradients apart.
        goal_us: Where a search may stop; no schedule can be faster.
        can_recompute: Whether memory may be saved by recomputing and offloading layers; where it
            may not, works are held back.
        one_queue: Whether schedules are for ranks with one hardware queue.

    Raises:
        ConfigError: The budget is none.
        InfeasibleError: A single microbatch does not fit into the memory of a rank.
    """

    def __init__(
        self,
        table: TaskTable,
        budget: Budget,
        *,
        split_backward: bool,
        goal_us: float,
        can_recompute: bool = True,
        one_queue: bool = False,
    ) -> None:
        budget.check()
        self.table = table
        self.levels: tuple[IntArray, ...] = (table.stored_bytes,)
        self.fitter: MemoryFitter | None = None
        fitter = MemoryFitter(table, split_backward=split_backward, one_queue=one_queue)
        self.holds_back = not can_recompute and not fitter.fits_at_once
        """Whether works have to wait for memory: orders made elsewhere do not know of it."""
        if can_recompute:
            self.levels = memory_levels(fitter.savings, table.rank, table.microbatch)
            if not fitter.fits_at_once:
                self.fitter = fitter
        self.first_level_fits = bool((self.levels[0] == table.stored_bytes).all())
        """Whether what the first level admits, by all that works hold, is within the limits."""
        self.forwards = BatchRules.forwards(
            table, split_backward=split_backward, levels=self.levels
        )
        self.num_evaluations = 0
        self.best: GreedySchedule | None = None
        self._budget = budget
        self._share = 1.0
        self._goal_us = goal_us * (1 + 1e-12)
        self._started = time.monotonic()
        self._kept: dict[bytes, GreedySchedule | None] = {}
        self._max_kept = max(1, _MAX_KEPT_TASKS // max(1, int(self.forwards.graph.exists.sum())))

    def allow(self, share: float) -> None:
        """Have :attr:`is_over` say so once this part of the budget is spent; all of it is given to
        begin with."""
        self._share = share

    @property
    def is_over(self) -> bool:
        """The budget is spent, or nothing better can be found; never before a first schedule."""
        if self.best is None:
            return False
        if self.has_reached_goal:
            return True
        if self._budget.evaluations is not None:
            return self.num_evaluations >= self._share * self._budget.evaluations
        assert self._budget.milliseconds is not None, "there is one of the two"
        return self.left_ms <= (1.0 - self._share) * self._budget.milliseconds

    @property
    def has_reached_goal(self) -> bool:
        """No schedule can be better than the best one."""
        return self.best is not None and self.best.makespan_us <= self._goal_us

    @property
    def spent_share(self) -> float:
        """The part of the budget that is spent."""
        if self._budget.evaluations is not None:
            return self.num_evaluations / self._budget.evaluations
        assert self._budget.milliseconds is not None, "there is one of the two"
        return 1.0 - self.left_ms / self._budget.milliseconds

    @property
    def left_ms(self) -> float:
        """What is left of a budget in milliseconds; infinite without one."""
        if self._budget.milliseconds is None:
            return math.inf
        return self._budget.milliseconds - (time.monotonic() - self._started) * 1000

    def evaluate(self, point: Point) -> GreedySchedule:
        """The schedule of ``point`` with time running forwards; the best one is remembered.

        A point that comes again counts as an evaluation, so that a search over few points ends.
        """
        schedule = self.schedule(self.forwards, point)
        assert schedule is not None, "the memory guard leaves no schedule unfinished"
        return self._remember(schedule)

    def refit(self, schedule: GreedySchedule, weights: FloatArray | None) -> GreedySchedule | None:
        """The same order, with its recomputation chosen by ``weights``.

        The best one is remembered; None where no recomputation makes the order fit.
        """
        self.num_evaluations += 1
        found = self._fit(schedule.order, schedule.starts_us, weights)
        return None if found is None else self._remember(found)

    def take(
        self, order: TaskOrder, starts_us: FloatArray, near: GreedySchedule
    ) -> GreedySchedule | None:
        """The schedule of an order that was made elsewhere, with as much effort as one of here.

        It recomputes by the weights of ``near``; None where no recomputation makes the order fit.
        """
        assert not self.holds_back, "an order made elsewhere may hold too much"
        self.num_evaluations += 1
        if self.fitter is None:
            ends_us = starts_us + self.forwards.graph.duration_us
            makespan_us = float(ends_us[self.forwards.graph.exists].max())
            return self._remember(
                GreedySchedule(order, starts_us, makespan_us, near.num_recomputed)
            )
        schedule = self._fit(order, starts_us, near.weights)
        return None if schedule is None else self._remember(schedule)

    def schedule(self, batch: BatchRules, point: Point) -> GreedySchedule | None:
        """The schedule of ``point`` under the rules of ``batch``; None where it cannot finish.

        With time running backwards it recomputes what ``point.near`` does.
        """
        self.num_evaluations += 1
        # Times of a schedule that was disturbed do not come again.
        if point.near is not None:
            return self._make(batch, point)
        name = _digest(batch, point)
        if name not in self._kept:
            if len(self._kept) >= self._max_kept:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self._make(batch, point)
        return self._kept[name]

    def _make(self, batch: BatchRules, point: Point) -> GreedySchedule | None:
        key, turn, microbatch_order, level, near = point
        rules = batch.make(key, turn, microbatch_order, level=level)
        duration_us = None
        if self.fitter is not None and near is not None and near.num_recomputed.any():
            duration_us = self.fitter.durations_us(near.num_recomputed)
        try:
            schedule = schedule_greedily(batch, rules, duration_us)
        except InfeasibleError:
            return None
        if self.fitter is None or batch is not self.forwards:
            return schedule
        if level == 0 and self.first_level_fits and duration_us is None:
            return schedule
        weights = None if near is None else near.weights
        return self._fit(schedule.order, schedule.starts_us, weights)

    def _fit(
        self, order: TaskOrder, starts_us: FloatArray, weights: FloatArray | None
    ) -> GreedySchedule | None:
        assert self.fitter is not None, "only called where not everything fits at once"
        fit = self.fitter.fit_and_run(order, starts_us, weights)
        return None if fit is None else as_schedule(order, fit, weights)

    def _remember(self, schedule: GreedySchedule) -> GreedySchedule:
        if self.best is None or schedule.makespan_us < self.best.makespan_us:
            self.best = schedule
        return schedule


def as_schedule(order: TaskOrder, fit: Fit, weights: FloatArray | None = None) -> GreedySchedule:
    """An order with what makes it keep the limits, chosen by ``weights``."""
    loans = Loaned(fit.num_offloaded, fit.order) if fit.num_offloaded.any() else None
    times = fit.times
    return GreedySchedule(
        order, times.starts_us, times.makespan_us, fit.num_recomputed, weights, loans
    )


def _digest(batch: BatchRules, point: Point) -> bytes:
    digest = hashlib.blake2b(point.key.tobytes(), digest_size=16)
    digest.update(point.microbatch_order.tobytes())
    digest.update(bytes([point.turn, batch.opening_kind, point.level]))
    return digest.digest()
