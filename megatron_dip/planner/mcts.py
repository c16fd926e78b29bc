"""Monte Carlo tree search over the orders in which segments enter the pipeline (DIP, III a).

A node is the set of what has entered, see :mod:`megatron_dip.planner.entry_orders`.  Nodes that are
reached in different orders are one node (transpositions).  A playout completes the order, mostly by
the default priority, and is judged by the dual queue: bound over makespan.  Children are chosen by
UCB1 (Kocsis and Szepesvari, "Bandit based Monte-Carlo planning", ECML 2006) among as many as the
visits of their parent allow (progressive widening), because a node has about as many children as
there are microbatches.
"""

import math

import numpy as np

from megatron_dip.planner.entry_orders import EntryOrders
from megatron_dip.planner.evaluator import Evaluator

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
        self._orders = EntryOrders(evaluator)
        self._num_pairs = len(self._orders.pairs)
        self._visits: dict[int, int] = {}
        self._value: dict[int, float] = {}

    def run(self) -> None:
        """Playouts until the budget is spent; the first is the default order, at every level."""
        found_us = self._orders.default_times_us()
        level = int(np.argmin(found_us))
        best_us, worst_us = min(found_us), max(found_us)
        while not self._evaluator.is_over:
            order, path = self._descend()
            schedule = self._orders.evaluate(self._complete(order, path[-1]), level)
            best_us = min(best_us, schedule.makespan_us)
            worst_us = max(worst_us, schedule.makespan_us)
            value = (worst_us - schedule.makespan_us) / max(worst_us - best_us, 1e-9)
            for node in path:
                self._visits[node] = self._visits.get(node, 0) + 1
                self._value[node] = self._value.get(node, 0.0) + value

    def _descend(self) -> tuple[list[int], list[int]]:
        """Pairs entered and nodes passed, down to the first node without visits."""
        node, path = 0, [0]
        order: list[int] = []
        while self._visits.get(node, 0) and len(order) < self._num_pairs:
            pair = self._choose(node)
            node |= 1 << pair
            order.append(pair)
            path.append(node)
        return order, path

    def _choose(self, node: int) -> int:
        visits = self._visits[node]
        width = 1 + int(math.sqrt(visits))
        best, best_score = -1, -math.inf
        for pair in self._orders.open_pairs(node)[:width]:
            child = node | 1 << pair
            child_visits = self._visits.get(child, 0)
            if not child_visits:
                return pair
            score = self._value[child] / child_visits
            score += _EXPLORATION * math.sqrt(math.log(visits + 1) / child_visits)
            if score > best_score:
                best, best_score = pair, score
        return best

    def _complete(self, order: list[int], node: int) -> list[int]:
        """The rest in the default order, every other time with some pairs out of their places."""
        rest = [pair for pair in range(self._num_pairs) if not node >> pair & 1]
        if self._random.random() < 0.5:
            return order + rest
        keys = np.arange(len(rest)) + self._random.normal(0.0, 1.5, len(rest))
        moved = [rest[i] for i in np.argsort(keys).tolist()]
        return order + self._orders.upstream_first(moved, node)
