"""One batch as flat arrays: what the compiled functions of simulator and planner compute on.

Tasks are those of :mod:`megatron_dip.plan.numbers`.  Tasks that a batch does not have keep their
numbers, without inputs, outputs or time, so that arrays of all variants have the same length.
"""

from typing import NamedTuple

import numpy as np

from megatron_dip.plan.numbers import BACKWARD_KIND, FORWARD_KIND, WEIGHT_KIND
from megatron_dip.plan.wiring import BoolArray, FloatArray, IntArray

__all__ = [
    "BACKWARD_KIND",
    "FORWARD_KIND",
    "WEIGHT_KIND",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "TaskGraph",
    "TaskOrder",
    "awaiting",
    "reverse_graph",
    "task_graph",
    "timed",
]


class TaskGraph(NamedTuple):
    """Who waits for whom, without the order of the ranks; N works, 3 N tasks, E edges."""

    rank: IntArray
    """[N]"""
    exists: BoolArray
    """[3 N]"""
    duration_us: FloatArray
    """[3 N]"""
    num_inputs: IntArray
    """[3 N]"""
    first_output: IntArray
    """[3 N + 1]: the outputs of task t are the edges first_output[t] to first_output[t + 1]."""
    output: IntArray
    """[E]: the task that waits."""
    delay_us: FloatArray
    """[E]: between the end of the one and the start of the other."""


class TaskOrder(NamedTuple):
    """Per rank, its tasks in order: rank r has task[first[r]] to task[first[r + 1]].

    Copies to and from the host, which are numbered from 3 N on, stand among them.
    """

    task: IntArray
    first: IntArray
    """[num_ranks + 1]"""


def task_graph(
    rank: IntArray, exists: BoolArray, feeds: tuple[IntArray, IntArray, FloatArray]
) -> TaskGraph:
    """The graph of a batch whose tasks take no time; see :func:`timed`.

    Args:
        rank: [N] rank of every work.
        exists: [3 N] which tasks the batch has.
        feeds: Works, the works whose forward waits for theirs, and the delays between them.
    """
    num_works = len(rank)
    source, target, delay = feeds
    works = np.arange(num_works)
    before = np.concatenate([source, target + num_works, works, works + num_works])
    after = np.concatenate([target, source + num_works, works + num_works, works + 2 * num_works])
    delays = np.concatenate([delay, delay, np.zeros(2 * num_works)])
    present = exists[before] & exists[after]
    edges = (before[present], after[present], delays[present])
    return _graph(rank, exists, np.zeros(len(exists)), edges)


def timed(graph: TaskGraph, duration_us: FloatArray) -> TaskGraph:
    """The same graph with other times, [3 N]; those of tasks that it does not have are ignored."""
    return graph._replace(duration_us=np.where(graph.exists, duration_us, 0.0))


def awaiting(graph: TaskGraph, before: IntArray, after: IntArray) -> TaskGraph:
    """The same batch, in which every task of ``after`` also waits for the one of ``before`` at its
    place; all of them exist."""
    known = np.repeat(np.arange(len(graph.exists)), np.diff(graph.first_output))
    edges = (
        np.concatenate([known, before]),
        np.concatenate([graph.output, after]),
        np.concatenate([graph.delay_us, np.zeros(len(before))]),
    )
    return _graph(graph.rank, graph.exists, graph.duration_us, edges)


def reverse_graph(graph: TaskGraph) -> TaskGraph:
    """The same batch with time running backwards."""
    before = np.repeat(np.arange(len(graph.exists)), np.diff(graph.first_output))
    edges = (graph.output, before, graph.delay_us)
    return _graph(graph.rank, graph.exists, graph.duration_us, edges)


def _graph(
    rank: IntArray,
    exists: BoolArray,
    duration_us: FloatArray,
    edges: tuple[IntArray, IntArray, FloatArray],
) -> TaskGraph:
    before, after, delays = edges
    num_tasks = len(exists)
    by_source = np.argsort(before, kind="stable")
    counts = np.bincount(before, minlength=num_tasks)
    return TaskGraph(
        rank=rank,
        exists=exists,
        duration_us=duration_us,
        num_inputs=np.bincount(after, minlength=num_tasks),
        first_output=np.concatenate([[0], np.cumsum(counts)]),
        output=after[by_source],
        delay_us=delays[by_source],
    )
