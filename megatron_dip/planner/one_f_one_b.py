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
from collections.abc import Callable

import numpy as np

from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.greedy import schedule_greedily
from megatron_dip.planner.kernels import CLOSERS_FIRST
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["in_flight_limits", "order_one_f_one_b"]


def order_one_f_one_b(table: TaskTable, *, split_backward: bool = False) -> TaskOrder:
    """Per rank, the compute actions of the batch in the order of 1F1B.

    Backwards go first, and the oldest microbatch before younger ones.
    """
    batch = BatchRules.forwards(table, split_backward=split_backward, levels=())
    limits = in_flight_limits(table.graph)
    limit = np.array([limits.get(stage, -1) for stage in batch.stages.tolist()], dtype=np.int64)
    oldest_first = np.argsort(np.argsort(batch.microbatch, kind="stable"))
    num_works = len(oldest_first)
    key = np.concatenate([oldest_first + kind * num_works for kind in range(3)])
    order = np.arange(table.graph.problem.num_microbatches)
    rules = batch.make(key, CLOSERS_FIRST, order, limit)
    return schedule_greedily(batch, rules).order


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
            if not graph.has_backward(stage.stage):
                continue
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
