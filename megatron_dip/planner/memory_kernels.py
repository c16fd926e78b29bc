"""The compiled inner loops of the memory program: which layers to recompute in a given order.

Places count through the orders of all ranks, one after another.  A rank computes one task at a
time, so that its order alone says which works it holds together.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder
from megatron_dip.simulator.kernels import RunState

__all__ = ["CoverState", "Savings", "cover", "latest_ends", "new_cover_state", "uncover"]


class Savings(NamedTuple):
    """What works hold and what recomputing takes off; N works."""

    stored_bytes: IntArray
    """[N]: without recomputation."""
    layer_bytes: IntArray
    """[N]: taken off by each recomputed layer."""
    num_layers: IntArray
    """[N]: that can be recomputed; zero where that saves nothing."""
    is_last: NDArray[np.bool_]
    """[3 N]: the tasks that end the backward of their work."""
    free_bytes: IntArray
    """[num_ranks]: what the limit leaves beside the weights."""


class CoverState(NamedTuple):
    """What choosing needs and leaves; T tasks in the order."""

    num_recomputed: IntArray
    """[N]: the choice."""
    start: IntArray
    """[N]: place of the forward."""
    end: IntArray
    """[N]: place of the task that ends the backward; -1 without one."""
    excess_bytes: FloatArray
    """[T + 1]: over the limit to begin with, summed over all forwards before."""
    held_bytes: IntArray
    """[T]: while the task runs."""
    change_bytes: IntArray
    """[T]: what comes back from the host before the task, less what has left."""
    live: IntArray
    """[T]: works that are held and have layers left to recompute."""
    slot: IntArray
    """[N]: where a work is among them; -1 where it is not."""


def new_cover_state(num_works: int, num_tasks: int) -> CoverState:
    """The state before anything is chosen."""
    return CoverState(
        num_recomputed=np.zeros(num_works, np.int64),
        start=np.zeros(num_works, np.int64),
        end=np.full(num_works, -1, np.int64),
        excess_bytes=np.zeros(num_tasks + 1),
        held_bytes=np.zeros(num_tasks, np.int64),
        change_bytes=np.zeros(num_tasks, np.int64),
        live=np.empty(num_tasks, np.int64),
        slot=np.full(num_works, -1, np.int64),
    )


@compiled
def cover(order: TaskOrder, savings: Savings, per_byte: FloatArray, state: CoverState) -> bool:
    """Recompute layers until every rank keeps its limit at every task.

    A sweep over each rank's order.  Where the limit is passed, the work goes first whose layers
    cost least per byte, and per excess that recomputing them takes off from here to its end.
    Starts from what ``state`` says is recomputed, and on the host for a while.

    Args:
        order: The tasks of every rank.
        savings: What can be saved.
        per_byte: [N] what recomputing costs for a byte taken off.
        state: Where the choice is left.

    Returns:
        False where not even recomputing everything keeps the limit.
    """
    num_works = len(savings.stored_bytes)
    for rank in range(len(order.first) - 1):
        _measure(order, savings, state, rank)
        held, num_live = 0, 0
        for place in range(order.first[rank], order.first[rank + 1]):
            task = order.task[place]
            number = task % num_works
            held += state.change_bytes[place]
            if task < num_works:
                held += savings.stored_bytes[number]
                held -= state.num_recomputed[number] * savings.layer_bytes[number]
                if state.end[number] >= 0 and (
                    state.num_recomputed[number] < savings.num_layers[number]
                ):
                    state.live[num_live], state.slot[number] = number, num_live
                    num_live += 1
            while held > savings.free_bytes[rank]:
                best, best_excess = -1, 0.0
                for index in range(num_live):
                    other = state.live[index]
                    excess = 1.0 + (
                        state.excess_bytes[state.end[other]] - state.excess_bytes[place]
                    )
                    # Quotients compared as products: divisions would take most of the time.
                    if best < 0 or per_byte[other] * best_excess < per_byte[best] * excess:
                        best, best_excess = other, excess
                if best < 0:
                    return False
                size = savings.layer_bytes[best]
                wanted = (held - savings.free_bytes[rank] + size - 1) // size
                left = savings.num_layers[best] - state.num_recomputed[best]
                count = min(wanted, left)
                state.num_recomputed[best] += count
                held -= count * size
                if count == left:
                    num_live = _drop(state, best, num_live)
            if savings.is_last[task]:
                layer_bytes = state.num_recomputed[number] * savings.layer_bytes[number]
                held -= savings.stored_bytes[number] - layer_bytes
                num_live = _drop(state, number, num_live)
    return True


@inlined
def _drop(state: CoverState, number: int, num_live: int) -> int:
    """Take a work off the live ones, if it is among them; how many are left."""
    slot = state.slot[number]
    if slot < 0:
        return num_live
    last = state.live[num_live - 1]
    state.live[slot], state.slot[last] = last, slot
    state.slot[number] = -1
    return num_live - 1


@compiled
def _measure(order: TaskOrder, savings: Savings, state: CoverState, rank: int) -> None:
    """Places of a rank's works, and what it holds over its limit to begin with."""
    num_works = len(savings.stored_bytes)
    held = 0
    for place in range(order.first[rank], order.first[rank + 1]):
        task = order.task[place]
        number = task % num_works
        held += state.change_bytes[place]
        if task < num_works:
            state.start[number] = place
            held += savings.stored_bytes[number]
            held -= state.num_recomputed[number] * savings.layer_bytes[number]
        # What is over at a backward was at a forward before it, or came back from the host.
        is_raised = task < num_works or state.change_bytes[place] > 0
        excess = max(0, held - savings.free_bytes[rank]) if is_raised else 0
        if savings.is_last[task]:
            state.end[number] = place
            held -= savings.stored_bytes[number]
            held += state.num_recomputed[number] * savings.layer_bytes[number]
        state.excess_bytes[place + 1] = state.excess_bytes[place] + excess


@compiled
def uncover(
    order: TaskOrder, savings: Savings, rank: IntArray, by_cost: IntArray, state: CoverState
) -> None:
    """Spend memory that is left over: store layers again, in the order of ``by_cost``.

    Args:
        order: The tasks of every rank.
        savings: What can be saved.
        rank: [N] rank of every work.
        by_cost: Works that recompute, those first whose recomputation is to be dropped first.
        state: As left by :func:`cover`; the choice is changed.
    """
    num_works = len(savings.stored_bytes)
    for index in range(len(order.first) - 1):
        held = 0
        for place in range(order.first[index], order.first[index + 1]):
            task = order.task[place]
            number = task % num_works
            size = savings.stored_bytes[number]
            size -= state.num_recomputed[number] * savings.layer_bytes[number]
            held += state.change_bytes[place]
            if task < num_works:
                held += size
            state.held_bytes[place] = held
            if savings.is_last[task]:
                held -= size
    for number in by_cost:
        size = savings.layer_bytes[number]
        left = savings.free_bytes[rank[number]]
        most = 0
        for place in range(state.start[number], state.end[number] + 1):
            most = max(most, state.held_bytes[place])
            if left - most < size:
                break
        count = min(state.num_recomputed[number], (left - most) // size)
        if count > 0:
            state.num_recomputed[number] -= count
            for place in range(state.start[number], state.end[number] + 1):
                state.held_bytes[place] += count * size


@compiled
def latest_ends(
    graph: TaskGraph, state: RunState, num_done: int, end_us: float, latest_us: FloatArray
) -> None:
    """When every task can end at the latest so that its order still ends at ``end_us``.

    Args:
        graph: The batch, with the times that were run.
        state: As left by running the order.
        num_done: How many tasks ran.
        end_us: The end of the whole.
        latest_us: [3 N] where the result is left.
    """
    latest_us[:] = end_us
    for place in range(num_done - 1, -1, -1):
        task = state.done[place]
        latest = end_us
        after = state.follower[task]
        if after >= 0:
            latest = latest_us[after] - (state.ends_us[after] - state.starts_us[after])
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            after = graph.output[edge]
            if state.num_waiting[after] < 0:
                continue
            before = latest_us[after] - (state.ends_us[after] - state.starts_us[after])
            latest = min(latest, before - graph.delay_us[edge])
        latest_us[task] = latest
