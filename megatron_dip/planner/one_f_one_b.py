"""1F1B on a module graph: the schedule that is right for any partition and any batch.

A stage at position v of the V positions with a backward on the longest path through it holds at
most ceil(P (V - v) / V) microbatches between their first forward and their last backward, P being
the ranks; backwards go before forwards.  For one module in one segment (V = P) this is the classic
schedule of Narayanan et al., PipeDream-Flush (arXiv 2006.09503), with P - v microbatches in flight
and a makespan of (m + P - 1)(f + b).  With several segments or modules a rank is visited V / P
times on the way and its microbatches are shared out over its stages.

Whole microbatches are counted, not sub-microbatches: a stage takes new microbatches in their order,
so that the oldest unfinished one is admitted everywhere and the schedule cannot stall.  Memory is
not looked at.
"""

import math
from collections.abc import Callable, Sequence

from megatron_dip.plan.actions import Action
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.greedy import Key, schedule_greedily
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["in_flight_limits", "order_one_f_one_b"]


def order_one_f_one_b(
    table: TaskTable, *, split_backward: bool = False
) -> tuple[tuple[Action, ...], ...]:
    """Per rank, the compute actions of the batch in the order of 1F1B."""
    return schedule_greedily(table, _Policy(table), split_backward=split_backward)


def in_flight_limits(graph: PipelineGraph) -> dict[int, int]:
    """Per stage with a backward, how many microbatches it may hold at once."""
    problem, partition = graph.problem, graph.partition
    modules = [name for name in problem.module_order if name in problem.modules_with_backward]
    length = {name: len(partition.chains[name]) for name in modules}
    before = _longest_paths(modules, length, lambda name: problem.module(name).upstream)
    after = _longest_paths(
        modules[::-1],
        length,
        lambda name: tuple(other for other in modules if name in problem.module(other).upstream),
    )
    limits: dict[int, int] = {}
    for name in modules:
        num_positions = before[name] + length[name] + after[name]
        for index, stage in enumerate(partition.chains[name]):
            left = num_positions - before[name] - index
            limits[stage.stage] = math.ceil(problem.num_ranks * left / num_positions)
    return limits


def _longest_paths(
    modules: list[str], length: dict[str, int], neighbours: Callable[[str], tuple[str, ...]]
) -> dict[str, int]:
    """Per module, the stages on the longest path that leads to it, without its own."""
    paths: dict[str, int] = {}
    for name in modules:
        paths[name] = max(
            (paths[other] + length[other] for other in neighbours(name) if other in paths),
            default=0,
        )
    return paths


class _Policy:
    """Backward first; the oldest microbatch first; microbatches in flight limited per stage."""

    def __init__(self, table: TaskTable) -> None:
        keys: list[Key] = [(work.microbatch, number) for number, work in enumerate(table.works)]
        self.forward_keys: Sequence[Key] = keys
        self.backward_keys: Sequence[Key] = keys
        self.source_keys: Sequence[Key] = keys
        self._works = table.works
        self._limits = in_flight_limits(table.graph)
        # Per stage: works per microbatch whose backward is still to end, microbatches in order.
        self._left: dict[int, dict[int, int]] = {}
        for work in table.works:
            counts = self._left.setdefault(work.stage, {})
            counts[work.microbatch] = counts.get(work.microbatch, 0) + 1
        self._queue = {stage: list(counts)[::-1] for stage, counts in self._left.items()}
        self._open: dict[int, set[int]] = {stage: set() for stage in self._left}

    def prefers_backward(self, rank: int) -> bool:
        return True

    def admits(self, number: int) -> bool:
        stage, microbatch, _ = self._works[number]
        if stage not in self._limits or microbatch in self._open[stage]:
            return True
        is_next = self._queue[stage][-1] == microbatch
        return is_next and len(self._open[stage]) < self._limits[stage]

    def forward_starts(self, number: int) -> None:
        stage, microbatch, _ = self._works[number]
        if stage in self._limits and microbatch not in self._open[stage]:
            self._queue[stage].pop()
            self._open[stage].add(microbatch)

    def backward_starts(self, number: int) -> None:
        """Nothing changes before the end."""

    def backward_ends(self, number: int) -> None:
        stage, microbatch, _ = self._works[number]
        self._left[stage][microbatch] -= 1
        if not self._left[stage][microbatch]:
            self._open[stage].remove(microbatch)
