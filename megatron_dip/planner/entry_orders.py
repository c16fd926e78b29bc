"""Orders in which segments enter the pipeline (DIP, III a), and the schedules that they stand for.

What enters is a pair of a module and a microbatch: the segments of one module in one microbatch
have one priority.  A pair can enter after those of the upstream modules in its microbatch.  A set
of pairs is a bit mask.
"""

import numpy as np

from megatron_dip.planner.evaluator import Evaluator, Point
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.kernels import ALTERNATE
from megatron_dip.planner.portfolio import Portfolio, Rule
from megatron_dip.planner.rules import places

__all__ = ["EntryOrders"]


class EntryOrders:
    """The pairs of one batch, numbered in the default order of the dual queue."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        table = evaluator.table
        self._num_microbatches = table.graph.problem.num_microbatches
        portfolio = Portfolio(table, evaluator.forwards)
        microbatch_order = portfolio.microbatch_orders()[0]
        self._default = portfolio.point(Rule("first", "tail", ALTERNATE), microbatch_order)
        modules = {stage.stage: stage.module for stage in table.graph.partition.stages}
        pairs = [
            (modules[stage], microbatch)
            for stage, microbatch in zip(
                table.stage.tolist(), table.microbatch.tolist(), strict=True
            )
        ]
        place = {int(m): index for index, m in enumerate(microbatch_order)}
        position = {name: i for i, name in enumerate(table.graph.problem.module_order)}
        self.pairs = sorted(set(pairs), key=lambda pair: (place[pair[1]], position[pair[0]]))
        numbers = {pair: number for number, pair in enumerate(self.pairs)}
        self._pair_of_work = np.array([numbers[pair] for pair in pairs], dtype=np.int64)
        self._needed = [
            sum(
                1 << numbers[upstream, microbatch]
                for upstream in table.graph.problem.module(name).upstream
                if (upstream, microbatch) in numbers
            )
            for name, microbatch in self.pairs
        ]

    def open_pairs(self, entered: int) -> list[int]:
        """Pairs that can enter after those in ``entered``, in the default order."""
        return [
            pair
            for pair, needed in enumerate(self._needed)
            if not entered >> pair & 1 and needed & entered == needed
        ]

    def upstream_first(self, order: list[int], entered: int = 0) -> list[int]:
        """``order`` with every pair after those that it needs; ``entered`` have been before."""
        rest, ordered = list(order), []
        while rest:
            pair = next(p for p in rest if self._needed[p] & entered == self._needed[p])
            rest.remove(pair)
            ordered.append(pair)
            entered |= 1 << pair
        return ordered

    def evaluate(self, order: list[int], level: int) -> GreedySchedule:
        """The dual queue's schedule of an order of all pairs, admitted at ``level``."""
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        num_works = len(self._pair_of_work)
        forward = places(place[self._pair_of_work] * num_works + np.arange(num_works))
        key = np.concatenate([forward, self._default.key[num_works:]])
        # A microbatch has entered when the last of its modules has.
        entered = np.full(self._num_microbatches, -1)
        for index, pair in enumerate(order):
            entered[self.pairs[pair][1]] = index
        microbatches = np.argsort(entered, kind="stable")
        return self._evaluator.evaluate(Point(key, ALTERNATE, microbatches, level))

    def default_times_us(self) -> list[float]:
        """Of the default order, at every level that the budget reaches."""
        default = list(range(len(self.pairs)))
        found: list[float] = []
        while len(found) < len(self._evaluator.levels) and not self._evaluator.is_over:
            found.append(self.evaluate(default, len(found)).makespan_us)
        return found
