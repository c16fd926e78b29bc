"""Monte Carlo tree search over the orders in which segments enter the pipeline (DIP, III a).

A node is the set of what has entered: (module, microbatch) pairs, an upstream module's before its
readers'.  Nodes that are reached in different orders are one node (transpositions).  A playout
completes the order, mostly by the default priority, and is judged by the dual queue: bound over
makespan.  Children are chosen by UCB1 (Kocsis and Szepesvari, "Bandit based Monte-Carlo planning",
ECML 2006) among as many as the visits of their parent allow (progressive widening), because a node
has about as many children as there are microbatches.
"""

import math

import numpy as np

from megatron_dip.planner.evaluator import Evaluator, Point
from megatron_dip.planner.kernels import ALTERNATE
from megatron_dip.planner.portfolio import Portfolio, Rule
from megatron_dip.planner.rules import places

__all__ = ["search_tree"]

_EXPLORATION = 0.3


def search_tree(evaluator: Evaluator, seed: int) -> None:
    """Spend the budget of ``evaluator``; the result is its best schedule."""
    _Tree(evaluator, seed).run()


class _Tree:
    """Statistics of all nodes; a node is a bit mask of the pairs that have entered."""

    def __init__(self, evaluator: Evaluator, seed: int) -> None:
        self._evaluator = evaluator
        self._random = np.random.default_rng(seed)
        table = evaluator.table
        self._num_microbatches = table.graph.problem.num_microbatches
        portfolio = Portfolio(table, evaluator.forwards)
        self._default_order = portfolio.microbatch_orders()[0]
        self._default = portfolio.point(Rule("first", "tail", ALTERNATE), self._default_order)
        modules = {stage.stage: stage.module for stage in table.graph.partition.stages}
        pairs = [
            (modules[stage], microbatch)
            for stage, microbatch in zip(
                table.stage.tolist(), table.microbatch.tolist(), strict=True
            )
        ]
        place = {int(m): index for index, m in enumerate(self._default_order)}
        position = {name: i for i, name in enumerate(table.graph.problem.module_order)}
        self._pairs = sorted(set(pairs), key=lambda pair: (place[pair[1]], position[pair[0]]))
        numbers = {pair: number for number, pair in enumerate(self._pairs)}
        self._pair_of_work = np.array([numbers[pair] for pair in pairs], dtype=np.int64)
        self._needed = [
            sum(
                1 << numbers[upstream, microbatch]
                for upstream in table.graph.problem.module(name).upstream
                if (upstream, microbatch) in numbers
            )
            for name, microbatch in self._pairs
        ]
        self._visits: dict[int, int] = {}
        self._value: dict[int, float] = {}
        self._best_us = math.inf
        self._worst_us = 0.0

    def run(self) -> None:
        """Playouts until the budget is spent; the first is the default order, at every level."""
        default = list(range(len(self._pairs)))
        found: list[float] = []
        while len(found) < len(self._evaluator.levels) and not self._evaluator.is_over:
            found.append(self._judge(default, len(found)))
        self._level = int(np.argmin(found))
        while not self._evaluator.is_over:
            order, path = self._descend()
            makespan_us = self._judge(self._complete(order, path[-1]), self._level)
            spread_us = max(self._worst_us - self._best_us, 1e-9)
            value = (self._worst_us - makespan_us) / spread_us
            for node in path:
                self._visits[node] = self._visits.get(node, 0) + 1
                self._value[node] = self._value.get(node, 0.0) + value

    def _descend(self) -> tuple[list[int], list[int]]:
        """Pairs entered and nodes passed, down to the first node without visits."""
        node, path = 0, [0]
        order: list[int] = []
        while self._visits.get(node, 0) and len(order) < len(self._pairs):
            pair = self._choose(node)
            node |= 1 << pair
            order.append(pair)
            path.append(node)
        return order, path

    def _choose(self, node: int) -> int:
        visits = self._visits[node]
        width = 1 + int(math.sqrt(visits))
        best, best_score = -1, -math.inf
        for pair in self._open_pairs(node)[:width]:
            child = node | 1 << pair
            child_visits = self._visits.get(child, 0)
            if not child_visits:
                return pair
            score = self._value[child] / child_visits
            score += _EXPLORATION * math.sqrt(math.log(visits + 1) / child_visits)
            if score > best_score:
                best, best_score = pair, score
        return best

    def _open_pairs(self, node: int) -> list[int]:
        """Pairs that can enter next, in the default order."""
        return [
            pair
            for pair, needed in enumerate(self._needed)
            if not node >> pair & 1 and needed & node == needed
        ]

    def _complete(self, order: list[int], node: int) -> list[int]:
        """The rest in the default order, every other time with some pairs out of their places."""
        rest = [pair for pair in range(len(self._pairs)) if not node >> pair & 1]
        if self._random.random() < 0.5:
            return order + rest
        keys = np.arange(len(rest)) + self._random.normal(0.0, 1.5, len(rest))
        return order + self._upstream_first([rest[i] for i in np.argsort(keys).tolist()], node)

    def _upstream_first(self, rest: list[int], node: int) -> list[int]:
        ordered: list[int] = []
        while rest:
            pair = next(p for p in rest if self._needed[p] & node == self._needed[p])
            rest.remove(pair)
            ordered.append(pair)
            node |= 1 << pair
        return ordered

    def _judge(self, order: list[int], level: int) -> float:
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        num_works = len(self._pair_of_work)
        forward = places(place[self._pair_of_work] * num_works + np.arange(num_works))
        key = np.concatenate([forward, self._default.key[num_works:]])
        # A microbatch has entered when the last of its modules has.
        entered = np.full(self._num_microbatches, -1)
        for index, pair in enumerate(order):
            entered[self._pairs[pair][1]] = index
        microbatches = np.argsort(entered, kind="stable")
        schedule = self._evaluator.evaluate(Point(key, ALTERNATE, microbatches, level))
        self._best_us = min(self._best_us, schedule.makespan_us)
        self._worst_us = max(self._worst_us, schedule.makespan_us)
        return schedule.makespan_us
