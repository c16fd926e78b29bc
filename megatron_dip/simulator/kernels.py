"""The compiled inner loops of the simulator: starts, ends and memory of a given order."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder

__all__ = ["RunState", "new_run_state", "peak_bytes", "run_order"]


class RunState(NamedTuple):
    """What running an order needs and leaves; N works."""

    starts_us: FloatArray
    """[3 N]"""
    ends_us: FloatArray
    """[3 N]"""
    done: IntArray
    """The tasks that ran, each after all that it waits for."""
    num_waiting: IntArray
    """[3 N]: inputs that are still to come; -1 for tasks that the order does not hold."""
    num_found: IntArray
    """[3 N]: inputs that the order holds."""
    follower: IntArray
    """[3 N]: the next task of the same rank, or -1."""


def new_run_state(graph: TaskGraph, order: TaskOrder) -> RunState:
    """The state before anything has run."""
    num_tasks = len(graph.exists)
    return RunState(
        starts_us=np.zeros(num_tasks),
        ends_us=np.zeros(num_tasks),
        done=np.empty(len(order.task), np.int64),
        num_waiting=np.full(num_tasks, -1, np.int64),
        num_found=np.zeros(num_tasks, np.int64),
        follower=np.full(num_tasks, -1, np.int64),
    )


@compiled
def run_order(
    graph: TaskGraph, whole_us: FloatArray, order: TaskOrder, state: RunState
) -> tuple[int, int]:
    """Every task of ``order`` as soon as its rank is free and its inputs have arrived.

    Args:
        graph: The batch with split backwards.
        whole_us: [3 N] times of the same tasks where the weight gradient has no task of its own.
        order: The tasks of every rank; a work is split if its weight gradient is among them.
        state: Where starts, ends and the tasks that ran are left.

    Returns:
        How many tasks ran, and a task that waits for one that ``order`` does not hold, or -1.
    """
    for task in order.task:
        state.num_waiting[task] = graph.num_inputs[task]
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            state.num_found[graph.output[edge]] += 1
    for task in order.task:
        if state.num_found[task] != state.num_waiting[task]:
            return 0, task
    for rank in range(len(order.first) - 1):
        for place in range(order.first[rank] + 1, order.first[rank + 1]):
            state.follower[order.task[place - 1]] = order.task[place]
            state.num_waiting[order.task[place]] += 1
    num_done = 0
    for task in order.task:
        if state.num_waiting[task] == 0:
            state.done[num_done] = task
            num_done += 1
    place = 0
    num_works = len(graph.rank)
    while place < num_done:
        task = state.done[place]
        place += 1
        end_us = state.starts_us[task] + graph.duration_us[task]
        if num_works <= task < 2 * num_works and state.num_waiting[task + num_works] < 0:
            end_us = state.starts_us[task] + whole_us[task]
        state.ends_us[task] = end_us
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            arrival_us = end_us + graph.delay_us[edge]
            num_done = _arrive(state, graph.output[edge], arrival_us, num_done)
        if state.follower[task] >= 0:
            num_done = _arrive(state, state.follower[task], end_us, num_done)
    return num_done, -1


@inlined
def _arrive(state: RunState, task: int, time_us: float, num_done: int) -> int:
    """One input less to wait for; how many tasks are done or can be."""
    if state.num_waiting[task] > 0:
        state.starts_us[task] = max(state.starts_us[task], time_us)
        state.num_waiting[task] -= 1
        if state.num_waiting[task] == 0:
            state.done[num_done] = task
            return num_done + 1
    return num_done


@compiled
def peak_bytes(
    stored_bytes: IntArray, is_last: NDArray[np.bool_], order: TaskOrder, peaks: IntArray
) -> None:
    """Per rank, the most that it holds; its order alone decides, because it runs one at a time.

    Args:
        stored_bytes: [N] what every work holds.
        is_last: [3 N] the tasks that end the backward of their work.
        order: The tasks of every rank.
        peaks: [num_ranks] what every rank holds before it starts; raised to its peak.
    """
    num_works = len(stored_bytes)
    for rank in range(len(peaks)):
        held = peaks[rank]
        for place in range(order.first[rank], order.first[rank + 1]):
            task = order.task[place]
            if task < num_works:
                held += stored_bytes[task]
                peaks[rank] = max(peaks[rank], held)
            elif is_last[task]:
                held -= stored_bytes[task % num_works]
