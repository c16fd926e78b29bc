"""The compiled inner loops of the simulator: starts, ends and memory of a given order."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder

__all__ = ["RunState", "Stored", "new_run_state", "peak_bytes", "run_order"]


class RunState(NamedTuple):
    """What running an order needs and leaves; N works."""

    starts_us: FloatArray
    """[3 N]"""
    ends_us: FloatArray
    """[3 N]"""
    copy_starts_us: FloatArray
    """[3 N]: of ``OFFLOAD``, ``RELEASE``, ``RELOAD``."""
    copy_ends_us: FloatArray
    """[3 N]"""
    link_free_us: FloatArray
    """[2, num_ranks]: the end of the last copy to the host, and from it."""
    done: IntArray
    """The tasks that ran, without copies, each after all that it waits for."""
    num_waiting: IntArray
    """[3 N]: inputs that are still to come; -1 for tasks that the order does not hold."""
    num_found: IntArray
    """[3 N]: inputs that the order holds."""
    follower: IntArray
    """[3 N]: the next task of the same rank, or -1."""
    place: IntArray
    """[3 N]: in the order."""


def new_run_state(graph: TaskGraph, order: TaskOrder) -> RunState:
    """The state before anything has run."""
    num_tasks = len(graph.exists)
    return RunState(
        starts_us=np.zeros(num_tasks),
        ends_us=np.zeros(num_tasks),
        copy_starts_us=np.zeros(num_tasks),
        copy_ends_us=np.zeros(num_tasks),
        link_free_us=np.zeros((2, len(order.first) - 1)),
        done=np.empty(len(order.task), np.int64),
        num_waiting=np.full(num_tasks, -1, np.int64),
        num_found=np.zeros(num_tasks, np.int64),
        follower=np.full(num_tasks, -1, np.int64),
        place=np.zeros(num_tasks, np.int64),
    )


@compiled
def run_order(
    graph: TaskGraph, whole_us: FloatArray, copy_us: FloatArray, order: TaskOrder, state: RunState
) -> tuple[int, int]:
    """Every task of ``order`` as soon as its rank is free and its inputs have arrived.

    A copy starts when the rank comes to its place and the link is free; the rank goes on, but waits
    at ``RELEASE`` for the end of the copy to the host.

    Args:
        graph: The batch with split backwards.
        whole_us: [3 N] times of the same tasks where the weight gradient has no task of its own.
        copy_us: [N] what copies of a work take.
        order: The tasks of every rank; a work is split if its weight gradient is among them.
        state: Where starts, ends and the tasks that ran are left.

    Returns:
        How many tasks ran, copies not counted, and a task that waits for one that ``order`` does
        not hold, or -1.
    """
    num_works = len(graph.rank)
    for place in range(len(order.task)):
        task = order.task[place]
        if task >= 3 * num_works:
            continue
        state.place[task] = place
        state.num_waiting[task] = graph.num_inputs[task]
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            state.num_found[graph.output[edge]] += 1
    for task in order.task:
        if task < 3 * num_works and state.num_found[task] != state.num_waiting[task]:
            return 0, task
    for rank in range(len(order.first) - 1):
        before = -1
        for place in range(order.first[rank], order.first[rank + 1]):
            task = order.task[place]
            if task >= 3 * num_works:
                continue
            if before >= 0:
                state.follower[before] = task
                state.num_waiting[task] += 1
            before = task
    num_done = 0
    for task in order.task:
        if task < 3 * num_works and state.num_waiting[task] == 0:
            state.done[num_done] = task
            num_done += 1
    place = 0
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
        free_us = _copy(graph, copy_us, order, state, task)
        after = state.follower[task]
        if after >= 0:
            if num_works <= after < 2 * num_works:
                free_us = max(free_us, state.copy_ends_us[after + num_works])
            num_done = _arrive(state, after, free_us, num_done)
    return num_done, -1


@inlined
def _copy(
    graph: TaskGraph, copy_us: FloatArray, order: TaskOrder, state: RunState, task: int
) -> float:
    """Run the copies behind ``task``; when what follows them can start."""
    num_works = len(graph.rank)
    now_us = state.ends_us[task]
    rank = graph.rank[task % num_works]
    place = state.place[task] + 1
    while place < order.first[rank + 1] and order.task[place] >= 3 * num_works:
        copy = order.task[place] - 3 * num_works
        number = copy % num_works
        direction = copy // num_works
        if direction == 1:
            now_us = max(now_us, state.copy_ends_us[number])
            state.copy_starts_us[copy] = state.copy_ends_us[copy] = now_us
        else:
            side = direction // 2
            start_us = max(now_us, state.link_free_us[side, rank])
            state.copy_starts_us[copy] = start_us
            state.copy_ends_us[copy] = state.link_free_us[side, rank] = start_us + copy_us[number]
        place += 1
    return now_us


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


class Stored(NamedTuple):
    """What works hold; N works."""

    bytes: IntArray
    """[N]: on the device, from the start of the forward to the end of the backward."""
    away_bytes: IntArray
    """[N]: of these, what is on the host between ``RELEASE`` and ``RELOAD``."""
    is_last: NDArray[np.bool_]
    """[3 N]: the tasks that end the backward of their work."""


@compiled
def peak_bytes(stored: Stored, order: TaskOrder, peaks: IntArray, host_peaks: IntArray) -> None:
    """Per rank, the most that it holds; its order alone decides, because it runs one at a time.

    Args:
        stored: What works hold.
        order: The tasks of every rank.
        peaks: [num_ranks] what every rank holds before it starts; raised to its peak.
        host_peaks: [num_ranks] the same of the memory of its host.
    """
    num_works = len(stored.bytes)
    for rank in range(len(peaks)):
        held, held_by_host = peaks[rank], host_peaks[rank]
        for place in range(order.first[rank], order.first[rank + 1]):
            task = order.task[place]
            number = task % num_works
            kind = task // num_works
            if kind == 0:
                held += stored.bytes[number]
            elif kind == 3:
                held_by_host += stored.away_bytes[number]
            elif kind == 4:
                held -= stored.away_bytes[number]
            elif kind == 5:
                held += stored.away_bytes[number]
            peaks[rank] = max(peaks[rank], held)
            host_peaks[rank] = max(host_peaks[rank], held_by_host)
            if kind == 1:
                held_by_host -= stored.away_bytes[number]
            if kind < 3 and stored.is_last[task]:
                held -= stored.bytes[number]
