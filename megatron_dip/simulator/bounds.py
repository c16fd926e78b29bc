"""What no schedule of a batch can beat, and what of its time is useful."""

import numpy as np

from megatron_dip.compiled import compiled
from megatron_dip.simulator.arrays import FloatArray, TaskGraph
from megatron_dip.simulator.tasks import TaskTable
from megatron_dip.workload import Problem

__all__ = ["lower_bound_us", "tails_us", "useful_work_us"]


def lower_bound_us(table: TaskTable, *, split_backward: bool = False) -> float:
    """The longest chain of dependencies, or the busiest rank, whichever takes longer.

    A rank cannot begin before the first of its inputs can arrive, then has all of its work to do,
    and after its last action the shortest chain that follows one of them.  With whole backwards a
    gradient leaves after ``B``.  With ``split_backward`` it leaves after ``I``, and ``W`` may be
    the last thing that a rank does: that bound holds for whole backwards too, and for both kinds in
    one schedule.  Give a table without recomputation for a bound on every schedule.
    """
    graph = table.split if split_backward else table.whole
    heads, rests = np.zeros(len(graph.exists)), _rests_us(graph)
    _follow(graph, heads)
    bound = float((heads + graph.duration_us + rests).max(initial=0.0))
    rank = np.tile(graph.rank, 3)
    for number in range(table.num_ranks):
        tasks = np.flatnonzero(graph.exists & (rank == number))
        if len(tasks):
            busy = graph.duration_us[tasks].sum()
            bound = max(bound, float(heads[tasks].min() + busy + rests[tasks].min()))
    return bound


def tails_us(graph: TaskGraph) -> FloatArray:
    """[3 N]: the longest chain that starts with a task; zero for tasks that the batch lacks."""
    return graph.duration_us + _rests_us(graph)


def _rests_us(graph: TaskGraph) -> FloatArray:
    rests = np.zeros(len(graph.exists))
    _look_ahead(graph, rests)
    return rests


# Works are numbered upstream first: forwards go to higher numbers, gradients to lower ones.


@compiled
def _follow(graph: TaskGraph, heads: FloatArray) -> None:
    """[3 N]: the earliest start of every task, where every rank does all at once; raised from 0."""
    num_works = len(graph.rank)
    for index in range(2 * num_works):
        task = index if index < num_works else 3 * num_works - 1 - index
        end_us = heads[task] + graph.duration_us[task]
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            other = graph.output[edge]
            heads[other] = max(heads[other], end_us + graph.delay_us[edge])


@compiled
def _look_ahead(graph: TaskGraph, rests: FloatArray) -> None:
    """[3 N]: the longest chain that follows every task; raised from 0."""
    num_works = len(graph.rank)
    for index in range(2 * num_works):
        task = num_works + index if index < num_works else 2 * num_works - 1 - index
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            other = graph.output[edge]
            tail_us = graph.duration_us[other] + rests[other]
            rests[task] = max(rests[task], tail_us + graph.delay_us[edge])


def useful_work_us(problem: Problem) -> float:
    """Times of all items in all layers with their extras, without overheads and recomputation."""
    total = 0.0
    for name in problem.module_order:
        layers = problem.module(name).num_layers
        for number in range(problem.num_microbatches):
            for item in problem.items(name, number):
                total += layers * item.forward_us
                total += item.first_extra_forward_us + item.last_extra_forward_us
                if name in problem.modules_with_backward:
                    total += layers * item.input_grad_us
                    total += item.first_extra_input_grad_us + item.last_extra_input_grad_us
                if problem.module(name).trainable:
                    total += layers * item.weight_grad_us
                    total += item.first_extra_weight_grad_us + item.last_extra_weight_grad_us
    return total
