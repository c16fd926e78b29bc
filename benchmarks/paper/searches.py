"""Searches that are compared with the planner's own, all on its evaluator and by processor time.

``random`` and ``depth-first`` go over the same orders as the planner's tree search: those in which
pairs of module and microbatch enter the pipeline.
"""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from megatron_dip.planner.entry_orders import EntryOrders
from megatron_dip.planner.evaluator import Budget, Evaluator, Point
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.local_search import LocalSearch
from megatron_dip.planner.mcts import search_tree
from megatron_dip.simulator.arrays import FloatArray, TaskOrder
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["SEARCHES", "ClockedEvaluator", "Search"]


class ClockedEvaluator(Evaluator):
    """Ends after ``budget_s`` of this thread's processor time and notes every improvement."""

    def __init__(self, table: TaskTable, budget_s: float, goal_us: float) -> None:
        self._begun_s = time.thread_time()
        self._budget_s = budget_s
        self.progress: list[tuple[float, float]] = []
        """Seconds, and the makespan in microseconds that was reached then."""
        budget = Budget(milliseconds=1000 * budget_s)
        super().__init__(table, budget, split_backward=False, goal_us=goal_us)

    @property
    def left_ms(self) -> float:
        """Of the processor time: the machine may be busy with other things."""
        return 1000 * (self._budget_s - self.spent_s)

    @property
    def spent_s(self) -> float:
        return time.thread_time() - self._begun_s

    def evaluate(self, point: Point) -> GreedySchedule:
        """As of every evaluator."""
        return self._noted(super().evaluate(point))

    def refit(self, schedule: GreedySchedule, weights: FloatArray | None) -> GreedySchedule | None:
        """As of every evaluator."""
        return self._noted(super().refit(schedule, weights))

    def take(
        self, order: TaskOrder, starts_us: FloatArray, near: GreedySchedule
    ) -> GreedySchedule | None:
        """As of every evaluator."""
        return self._noted(super().take(order, starts_us, near))

    def _noted[Found: GreedySchedule | None](self, schedule: Found) -> Found:
        best = self.best
        if best and (not self.progress or best.makespan_us < self.progress[-1][1]):
            self.progress.append((self.spent_s, best.makespan_us))
        return schedule


Search = Callable[[Evaluator, int], None]
"""Spends the budget of an evaluator; the number is the seed."""


def search_locally(evaluator: Evaluator, seed: int) -> None:
    """The planner's default search."""
    LocalSearch(evaluator, seed).run()


def search_at_random(evaluator: Evaluator, seed: int) -> None:
    """Orders drawn independently, upstream first; the first is the default order."""
    orders = EntryOrders(evaluator)
    random = np.random.default_rng(seed)
    level = int(np.argmin(orders.default_times_us()))
    while not evaluator.is_over:
        drawn = random.permutation(len(orders.pairs)).tolist()
        orders.evaluate(orders.upstream_first(drawn), level)


def search_depth_first(evaluator: Evaluator, seed: int) -> None:
    """All orders, one after the other, from the default order: what enters last changes first."""
    orders = EntryOrders(evaluator)
    level = int(np.argmin(orders.default_times_us()))
    for order in _depth_first(orders, [], 0):
        if evaluator.is_over:
            return
        orders.evaluate(order, level)


def _depth_first(orders: EntryOrders, order: list[int], entered: int) -> Iterator[list[int]]:
    if len(order) == len(orders.pairs):
        yield order
        return
    for pair in orders.open_pairs(entered):
        yield from _depth_first(orders, [*order, pair], entered | 1 << pair)


SEARCHES: Mapping[str, Search] = {
    "ours (local search)": search_locally,
    "ours (tree search, MCTS)": search_tree,
    "random": search_at_random,
    "depth-first": search_depth_first,
}
