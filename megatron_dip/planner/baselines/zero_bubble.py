"""Zero-bubble pipeline: weight gradients wait for the moments in which a rank would idle.

After ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): forwards and input
gradients in the order of 1F1B on the same cut, and on every rank at most as many microbatches
between forward and weight gradient as 1F1B holds on its first rank, which is the number of ranks.
With equal pieces it takes M (F + I + W) + (P - 1) (F + I - W).  The published schedule is made
once, from mean times; this one is made anew for every batch, from the true times: generous.
"""

import numpy as np

from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.megatron_orders import Step, one_f_one_b_order
from megatron_dip.planner.baselines.static import StaticRun, finish_run, make_graph
from megatron_dip.simulator.arrays import TaskGraph, TaskOrder

__all__ = ["run_zero_bubble"]


def run_zero_bubble(chain: FlatChain, cut: StaticCut) -> StaticRun:
    """Simulate ``cut``, which has one piece per rank, with split backwards."""
    assert cut.num_virtual == 1, "zero-bubble runs on the cut of 1F1B"
    costs = chain.costs(cut)
    graph = make_graph(chain, cut, costs)
    order = _Filling(graph, cut.num_ranks).order()
    return finish_run(chain, cut, 0, costs, graph, order)


class _Filling:
    """Steps of 1F1B as early as they can be, and weight gradients in the gaps between them."""

    def __init__(self, graph: TaskGraph, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._num_works = len(graph.rank)
        self._num_microbatches = self._num_works // num_ranks
        self._exists = graph.exists.tolist()
        self._duration_us = graph.duration_us.tolist()
        self._outputs = [
            list(
                zip(
                    graph.output[first:end].tolist(),
                    graph.delay_us[first:end].tolist(),
                    strict=True,
                )
            )
            for first, end in zip(graph.first_output[:-1], graph.first_output[1:], strict=True)
        ]
        self._num_inputs = graph.num_inputs.tolist()
        self._ready_us = [0.0] * len(self._exists)
        self._free_us = [0.0] * num_ranks
        self._num_held = [0] * num_ranks
        self._weights: list[list[int]] = [[] for _ in range(num_ranks)]
        self._steps = [self._one_f_one_b(rank)[::-1] for rank in range(num_ranks)]

    def _one_f_one_b(self, rank: int) -> list[int]:
        steps = one_f_one_b_order(self._num_ranks, self._num_microbatches, rank)
        tasks = [self._task(rank, step) for step in steps]
        return [task for task in tasks if self._exists[task]]

    def _task(self, rank: int, step: Step) -> int:
        work = rank * self._num_microbatches + step.microbatch
        return work + self._num_works * step.is_backward

    def order(self) -> TaskOrder:
        """Always what can start first, over all ranks."""
        lines: list[list[int]] = [[] for _ in range(self._num_ranks)]
        while any(self._steps) or any(self._weights):
            start_us, rank = min((self._next(rank)[0], rank) for rank in range(self._num_ranks))
            task = self._next(rank)[1]
            self._run(rank, task, start_us)
            lines[rank].append(task)
        first = np.cumsum([0, *map(len, lines)])
        return TaskOrder(np.array([task for line in lines for task in line]), first)

    def _next(self, rank: int) -> tuple[float, int]:
        """When the next task of a rank can start, and which it is."""
        free_us = self._free_us[rank]
        start_us, task = np.inf, -1
        if self._steps[rank]:
            task = self._steps[rank][-1]
            is_full = task < self._num_works and self._num_held[rank] >= self._num_ranks
            if not self._num_inputs[task] and not is_full:
                start_us = max(free_us, self._ready_us[task])
        if self._weights[rank] and start_us > free_us:
            return free_us, self._weights[rank][0]
        return start_us, task

    def _run(self, rank: int, task: int, start_us: float) -> None:
        end_us = start_us + self._duration_us[task]
        self._free_us[rank] = end_us
        kind, work = divmod(task, self._num_works)
        weight = 2 * self._num_works + work
        if kind == 2:
            self._weights[rank].pop(0)
            self._num_held[rank] -= 1
            return
        self._steps[rank].pop()
        for other, delay_us in self._outputs[task]:
            self._num_inputs[other] -= 1
            self._ready_us[other] = max(self._ready_us[other], end_us + delay_us)
        if self._exists[weight]:
            if kind == 0:
                self._num_held[rank] += 1
            else:
                self._weights[rank].append(weight)
