"""Event-driven list scheduling: the engine under 1F1B, the dual queue and the searches.

Time advances from event to event.  Whenever a rank is idle it takes the best action that is ready
(all inputs arrived, transfers included) and that the rules admit; it never waits for a better one.
A rank has three queues: forwards, backwards, and weight gradients of split backwards, which fill
the gaps that the other two leave.  The loop itself is :mod:`megatron_dip.planner.kernels`.
"""

from typing import NamedTuple

import numpy as np

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner.kernels import Rules, list_schedule
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskOrder
from megatron_dip.simulator.simulate import decode_order

__all__ = ["GreedySchedule", "Loaned", "schedule_greedily"]


class Loaned(NamedTuple):
    """What the host holds for a while."""

    num_layers: IntArray
    """[N]: offloaded layers of every work."""
    order: TaskOrder
    """The order with its copies."""


class GreedySchedule(NamedTuple):
    """What the engine made."""

    order: TaskOrder
    starts_us: FloatArray
    """[3 N]"""
    makespan_us: float
    num_recomputed: IntArray
    """[N]: layers of every work that are recomputed."""
    weights: FloatArray | None = None
    """[N]: what the recomputation was chosen by; see :mod:`megatron_dip.planner.memory`."""
    loans: Loaned | None = None
    """What is offloaded; None where nothing is."""


def schedule_greedily(
    batch: BatchRules, rules: Rules, duration_us: FloatArray | None = None
) -> GreedySchedule:
    """The compute order that ``rules``, made by ``batch``, make of its works.

    Args:
        batch: What is to be done.
        rules: In which order.
        duration_us: [3 N] times other than those of the batch.

    Raises:
        InfeasibleError: The rules admit nothing although work is left.
    """
    state, graph = batch.state, batch.graph
    if duration_us is not None:
        graph = graph._replace(duration_us=duration_us)
    makespan_us = list_schedule(graph, rules, state)
    lines = [line[:length] for line, length in zip(state.order, state.order_length, strict=True)]
    first = np.concatenate([[0], np.cumsum(state.order_length)])
    order = TaskOrder(np.concatenate(lines), first)
    if len(order.task) < int(batch.graph.exists.sum()):
        raise InfeasibleError(_what_is_left(batch, order))
    none_recomputed = np.zeros(len(graph.rank), np.int64)
    return GreedySchedule(order, state.starts_us.copy(), makespan_us, none_recomputed)


def _what_is_left(batch: BatchRules, order: TaskOrder) -> str:
    left = batch.graph.exists.copy()
    left[order.task] = False
    heads = []
    for rank in range(batch.table.num_ranks):
        waiting = [task for task in np.flatnonzero(left).tolist() if batch.rank_of(task) == rank]
        if waiting:
            line = TaskOrder(np.array(waiting[:1]), np.array([0, 1]))
            heads.append(f"rank {rank}: {decode_order(batch.table, line)[0][0]}")
    return f"the schedule admits nothing more although work is left: {', '.join(heads)}"
