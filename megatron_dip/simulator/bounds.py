"""What no schedule of a batch can beat, and what of its time is useful."""

from collections.abc import Callable

import numpy as np

from megatron_dip.compiled import compiled
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph
from megatron_dip.simulator.tasks import TaskTable
from megatron_dip.workload import Item, Problem

__all__ = ["heads_us", "item_work_us", "lower_bound_us", "tails_us", "useful_work_us"]


def lower_bound_us(table: TaskTable, *, split_backward: bool = False) -> float:
    """What the busiest rank takes if it may interrupt its actions and all others are never busy.

    A rank cannot begin an action before the longest chain before it is done, and after it the
    longest chain that follows must run.  Of what a rank can begin, that with the longest chain
    behind it goes first: no order ends earlier (Jackson's preemptive schedule; Carlier, "The
    one-machine sequencing problem", EJOR 11, 1982).  That is never below the longest chain of
    dependencies, nor below the earliest start + work + shortest tail of a rank.

    With whole backwards a gradient leaves after ``B``.  With ``split_backward`` it leaves after
    ``I``, and ``W`` may be the last thing that a rank does: that bound holds for whole backwards
    too, and for both kinds in one schedule.  Give a table without recomputation for a bound on
    every schedule.
    """
    graph = table.split if split_backward else table.whole
    heads, tails = heads_us(graph), tails_us(graph)
    tasks = np.flatnonzero(graph.exists)
    tasks = tasks[np.argsort(heads[tasks], kind="stable")]
    rank = np.tile(graph.rank, 3)[tasks]
    bound = 0.0
    for number in range(table.num_ranks):
        own = tasks[rank == number]
        duration = graph.duration_us[own]
        bound = max(bound, _one_rank_us(heads[own], duration, tails[own] - duration))
    return bound


def heads_us(graph: TaskGraph) -> FloatArray:
    """[3 N]: the longest chain that a task waits for; zero for tasks that the batch lacks."""
    heads = np.zeros(len(graph.exists))
    _follow(graph, heads)
    return heads


def tails_us(graph: TaskGraph) -> FloatArray:
    """[3 N]: the longest chain that starts with a task; zero for tasks that the batch lacks."""
    rests = np.zeros(len(graph.exists))
    _look_ahead(graph, rests)
    return graph.duration_us + rests


def _one_rank_us(heads: FloatArray, duration_us: FloatArray, rests: FloatArray) -> float:
    """When the last chain behind a rank's actions ends; actions in the order of their heads.

    What has at least a given rest goes before all else, as if that were not there: with no gap but
    before a head.  So the result is the most, over all rests, of that rest and the end of these.
    """
    size = 1 << max(0, len(heads) - 1).bit_length()
    work_us, end_us = np.zeros(2 * size), np.full(2 * size, -np.inf)
    longest_rest_first = np.argsort(-rests, kind="stable")
    return _latest_end(longest_rest_first, heads, duration_us, rests, work_us, end_us)


@compiled
def _latest_end(
    tasks: IntArray,
    heads: FloatArray,
    duration_us: FloatArray,
    rests: FloatArray,
    work_us: FloatArray,
    end_us: FloatArray,
) -> float:
    """As above; ``work_us`` and ``end_us`` are a tree over the heads, which starts empty."""
    latest_us = 0.0
    for task in tasks:
        node = len(work_us) // 2 + task
        work_us[node], end_us[node] = duration_us[task], heads[task] + duration_us[task]
        while node > 1:
            node //= 2
            left, right = 2 * node, 2 * node + 1
            work_us[node] = work_us[left] + work_us[right]
            end_us[node] = max(end_us[left] + work_us[right], end_us[right])
        latest_us = max(latest_us, end_us[1] + rests[task])
    return latest_us


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
        work_us = item_work_us(problem, name)
        for number in range(problem.num_microbatches):
            for item in problem.items(name, number):
                total += work_us(item)
    return total


def item_work_us(problem: Problem, name: str) -> Callable[[Item], float]:
    """What an item of module ``name`` takes, forward and backward, in all layers and extras."""
    module = problem.module(name)
    first = problem.first_with_backward.get(name)
    layers = range(module.num_layers)
    num_with_backward = 0 if first is None else len(layers[max(first, 0) :])
    num_trained = module.num_trained(layers)

    def work_us(item: Item) -> float:
        total = module.num_layers * item.forward_us
        total += item.first_extra_forward_us + item.last_extra_forward_us
        total += num_with_backward * item.input_grad_us
        total += (first == -1) * item.first_extra_input_grad_us
        total += (first is not None) * item.last_extra_input_grad_us
        total += num_trained * item.weight_grad_us
        total += module.trains_first_extra * item.first_extra_weight_grad_us
        total += module.trains_last_extra * item.last_extra_weight_grad_us
        return total

    return work_us
