"""Priority rules: a few dozen points of which one is good for almost every batch."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_dip.planner.evaluator import Point
from megatron_dip.planner.kernels import ALTERNATE, BY_KEY, CLOSERS_FIRST
from megatron_dip.planner.rules import BatchRules, places
from megatron_dip.simulator.arrays import FloatArray, IntArray
from megatron_dip.simulator.bounds import tails_us
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Portfolio", "Rule"]


class Rule(NamedTuple):
    """How forwards and backwards are sorted, beside the order of the microbatches."""

    forward: str
    """``first``: by microbatch, upstream first; ``deep``: by microbatch, downstream first;
    ``tail``: the longest chain that follows."""
    backward: str
    """``tail``: the longest chain that follows; ``first``: by microbatch."""
    turn: int


class Portfolio:
    """The rules and microbatch orders of one batch."""

    def __init__(self, table: TaskTable, batch: BatchRules) -> None:
        self._microbatch = batch.microbatch
        self._tail_us, self._backward_tail_us, _ = np.split(tails_us(table.whole), 3)
        self.load_us = np.zeros(table.graph.problem.num_microbatches)
        np.add.at(self.load_us, self._microbatch, _work_us(table))

    def microbatch_orders(self) -> tuple[IntArray, ...]:
        """Light first and last; heavy first; light first; as given."""
        light_first = np.argsort(self.load_us, kind="stable")
        peak = np.concatenate([light_first[::2], light_first[1::2][::-1]])
        return peak, light_first[::-1].copy(), light_first, np.arange(len(light_first))

    def rules(self) -> tuple[Rule, ...]:
        """The most useful ones first."""
        pairs = [
            ("first", "tail"),
            ("tail", "tail"),
            ("deep", "tail"),
            ("tail", "first"),
            ("first", "first"),
        ]
        turns = (ALTERNATE, CLOSERS_FIRST, BY_KEY)
        return tuple(Rule(forward, backward, turn) for turn in turns for forward, backward in pairs)

    def starts(self) -> Iterator[tuple[Rule, IntArray]]:
        """Every rule with every order; the first is the default of the dual queue."""
        for rule in self.rules():
            for order in self.microbatch_orders():
                yield rule, order

    def point(self, rule: Rule, order: IntArray) -> Point:
        """The point of ``rule`` with the microbatches in ``order``."""
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        work_place = place[self._microbatch]
        numbers = np.arange(len(work_place))
        forward: FloatArray | IntArray = -self._tail_us
        if rule.forward != "tail":
            sign = 1 if rule.forward == "first" else -1
            forward = work_place * len(numbers) + sign * numbers
        backward: FloatArray | IntArray = -self._backward_tail_us
        if rule.backward == "first":
            backward = work_place * len(numbers) - numbers
        if rule.turn == BY_KEY and rule.forward == rule.backward == "tail":
            key = places(np.concatenate([forward, backward]))
        elif rule.turn == BY_KEY:
            # Backwards and forwards take turns in the one order that they have in common.
            key = places(np.concatenate([2 * places(forward), 2 * places(backward) + 1]))
        else:
            key = np.concatenate([places(forward), len(numbers) + places(backward)])
        return Point(np.concatenate([key, 2 * len(numbers) + numbers]), rule.turn, order)


def _work_us(table: TaskTable) -> FloatArray:
    return table.forward_us + table.input_grad_us + table.weight_grad_us
