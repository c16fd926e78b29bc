"""The default search: priority rules, then small changes of the best schedule.

First every rule of the portfolio.  Then, until the budget is spent, one of two moves:

- *reorder*: two microbatches change places in the order of the best rule;
- *justify*: the best schedule is made anew from its end, every action as late as it can be, and
  again from its start, every action as early as it can be, with its times, slightly disturbed, as
  keys (forward-backward improvement of project scheduling; Valls, Ballestin, Quintanilla,
  "Justification and RCPSP", EJOR 165, 2005).

A move that succeeds more often is tried more often.  What is as good as the best is kept, so that
the search can drift.
"""

import numpy as np

from megatron_dip.planner.evaluator import Evaluator, Point
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.kernels import BY_KEY
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.planner.rules import BatchRules, places
from megatron_dip.simulator.arrays import FloatArray, IntArray

__all__ = ["search_locally"]

# How far times are disturbed, as parts of the makespan.
_DISTURBANCES = (0.003, 0.01, 0.03, 0.1)


def search_locally(evaluator: Evaluator, seed: int) -> None:
    """Spend the budget of ``evaluator``; the result is its best schedule."""
    _LocalSearch(evaluator, seed).run()


class _LocalSearch:
    def __init__(self, evaluator: Evaluator, seed: int) -> None:
        self._evaluator = evaluator
        self._random = np.random.default_rng(seed)
        self._batch = evaluator.forwards
        self._portfolio = Portfolio(evaluator.table, self._batch)
        graph = self._batch.graph
        self._exists = graph.exists
        self._duration_us = graph.duration_us
        self._microbatch = np.tile(self._batch.microbatch, 3)[graph.exists]
        self._is_split = bool(graph.exists[2 * len(graph.rank) :].any())
        self._backwards: BatchRules | None = None

    def run(self) -> None:
        evaluator = self._evaluator
        best_us = np.inf
        for rule, order in self._portfolio.starts():
            schedule = evaluator.evaluate(self._portfolio.point(rule, order))
            if schedule.makespan_us < best_us:
                best_us, self._rule, self._order = schedule.makespan_us, rule, order
                self._current = schedule
            if evaluator.is_over:
                return
        self._rule_us = best_us
        if not self._is_split:
            self._backwards = BatchRules.backwards(evaluator.table)
        tries, wins = np.ones(2), np.ones(2)
        while not evaluator.is_over:
            move = int(self._random.random() * (wins / tries).sum() >= wins[0] / tries[0])
            before_us = self._current.makespan_us
            if move == 0:
                self._reorder()
            else:
                self._justify()
            tries[move] += 1
            wins[move] += self._current.makespan_us < before_us

    def _reorder(self) -> None:
        order = self._order.copy()
        if len(order) > 1:
            first, second = self._random.choice(len(order), 2, replace=False)
            order[[first, second]] = order[[second, first]]
        schedule = self._evaluator.evaluate(self._portfolio.point(self._rule, order))
        if schedule.makespan_us <= self._rule_us:
            self._rule_us, self._order = schedule.makespan_us, order
        self._keep(schedule)

    def _justify(self) -> None:
        width_us = self._current.makespan_us * self._random.choice(_DISTURBANCES)
        noise_us = self._random.normal(0.0, width_us, len(self._exists))
        schedule = self._rebuild(self._current, noise_us)
        while schedule is not None:
            self._keep(schedule)
            if self._evaluator.is_over:
                return
            again = self._rebuild(schedule, np.zeros(len(noise_us)))
            if again is None or again.makespan_us >= schedule.makespan_us:
                return
            schedule = again

    def _rebuild(self, schedule: GreedySchedule, noise_us: FloatArray) -> GreedySchedule | None:
        starts_us = schedule.starts_us + noise_us
        if self._backwards is not None:
            ends_us = starts_us + self._duration_us
            point = Point(self._places(-ends_us), BY_KEY, self._by_end(ends_us)[::-1].copy())
            late = self._evaluator.schedule(self._backwards, point)
            if late is None:
                return None
            starts_us = late.makespan_us - late.starts_us - self._duration_us
        order = self._by_end(starts_us + self._duration_us)
        return self._evaluator.evaluate(Point(self._places(starts_us), BY_KEY, order))

    def _keep(self, schedule: GreedySchedule) -> None:
        if schedule.makespan_us <= self._current.makespan_us:
            self._current = schedule

    def _places(self, times_us: FloatArray) -> IntArray:
        """Keys by time; tasks that the batch does not have come last."""
        return places(np.where(self._exists, times_us, np.inf))

    def _by_end(self, ends_us: FloatArray) -> IntArray:
        """Microbatches by the time at which the last of their tasks ends."""
        last_us = np.full(len(self._portfolio.load_us), -np.inf)
        np.maximum.at(last_us, self._microbatch, ends_us[self._exists])
        return np.argsort(last_us, kind="stable")
