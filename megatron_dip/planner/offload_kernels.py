"""The compiled inner loops of offloading: what of an order is lent to the host, and when.

Places count through the orders of all ranks, one after another, as in
:mod:`megatron_dip.planner.memory_kernels`.  A copy "at" a place stands before the task there.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskOrder

__all__ = ["Lending", "Loans", "lend", "new_loans"]

# Of a microsecond of a copy, against one of a rank: of works that need not be waited for, those go
# first that keep most memory free for their time on the link.
_LINK_PRICE = 0.02


class Lending(NamedTuple):
    """What can be lent; N works."""

    stored_bytes: IntArray
    """[N]: held where nothing is lent."""
    layer_bytes: IntArray
    """[N]: that a lent layer takes off."""
    num_layers: IntArray
    """[N]: that can be lent; zero where that frees nothing."""
    is_last: NDArray[np.bool_]
    """[3 N]: the tasks that end the backward of their work."""
    free_bytes: IntArray
    """[num_ranks]: what the limit leaves beside the weights."""
    host_bytes: IntArray
    """[num_ranks]: what the host lends."""
    latency_us: float
    bytes_per_us: float
    is_aligned: bool
    """Copies start at ends of computing: with one hardware queue, what waits for the link holds up
    all that stands behind it."""


class Loans(NamedTuple):
    """What lending needs and leaves; T tasks in the order."""

    num_layers: IntArray
    """[N]: lent; zero for works that stay."""
    out: IntArray
    """[N]: place of ``OFFLOAD``."""
    free: IntArray
    """[N]: place of ``RELEASE``."""
    back: IntArray
    """[N]: place of ``RELOAD``."""
    out_us: FloatArray
    """[N]: when the copy to the host is meant to start; copies at one place go by it."""
    back_us: FloatArray
    """[N]"""
    forward: IntArray
    """[N]: place of the forward."""
    backward: IntArray
    """[N]: place of the backward or input gradient; -1 without one."""
    held_bytes: IntArray
    """[T]: while the task runs."""
    host_bytes: IntArray
    """[T]"""
    excess_bytes: FloatArray
    """[T + 1]: over the limit to begin with, summed over all tasks before."""
    starts_us: FloatArray
    """[T]: raised by what the rank waits for."""
    ends_us: FloatArray
    """[T]"""
    live: IntArray
    """[T]: works that could be lent."""
    link_from_us: FloatArray
    """[2, T]: copies of the rank to the host, and from it, ascending."""
    link_until_us: FloatArray
    """[2, T]"""
    num_copies: IntArray
    """[2]"""


def new_loans(num_works: int, num_tasks: int) -> Loans:
    """The state before anything is lent."""
    return Loans(
        num_layers=np.zeros(num_works, np.int64),
        out=np.empty(num_works, np.int64),
        free=np.empty(num_works, np.int64),
        back=np.empty(num_works, np.int64),
        out_us=np.empty(num_works),
        back_us=np.empty(num_works),
        forward=np.empty(num_works, np.int64),
        backward=np.full(num_works, -1, np.int64),
        held_bytes=np.zeros(num_tasks, np.int64),
        host_bytes=np.zeros(num_tasks, np.int64),
        excess_bytes=np.zeros(num_tasks + 1),
        starts_us=np.empty(num_tasks),
        ends_us=np.empty(num_tasks),
        live=np.empty(num_tasks, np.int64),
        link_from_us=np.empty((2, num_tasks)),
        link_until_us=np.empty((2, num_tasks)),
        num_copies=np.zeros(2, np.int64),
    )


@compiled
def lend(
    order: TaskOrder,
    lending: Lending,
    times: tuple[FloatArray, FloatArray],
    per_byte: FloatArray,
    loans: Loans,
) -> None:
    """Lend layers to the host until every rank keeps its limit, as far as the link can.

    A sweep over each rank's order.  Where the limit is passed, the work goes first that keeps most
    memory free where it is short, up to its backward, for the time that the rank waits for its copy
    and that the copy takes.  A rank waits only for what would take longer to recompute.  Its copy
    starts as soon as the link is free after the forward, and comes back as late as the link allows
    before the backward.

    Args:
        order: The tasks of every rank.
        lending: What can be lent.
        times: [3 N] starts and durations of all tasks with nothing lent.
        per_byte: [N] what recomputing costs for a byte taken off; infinite where nothing can be.
        loans: Where the choice is left; what is still over the limit must be recomputed.
    """
    num_works = len(lending.stored_bytes)
    for rank in range(len(order.first) - 1):
        _measure(order, lending, times, loans, rank)
        num_live = 0
        loans.num_copies[:] = 0
        before_us = 0.0
        for place in range(order.first[rank], order.first[rank + 1]):
            task = order.task[place]
            number = task % num_works
            took_us = loans.ends_us[place] - loans.starts_us[place]
            loans.starts_us[place] = max(loans.starts_us[place], before_us)
            if loans.backward[number] == place:
                num_live = _drop(loans, number, num_live)
            while loans.held_bytes[place] > lending.free_bytes[rank] and num_live > 0:
                best = _choose(lending, per_byte, loans, (rank, place, num_live))
                if best < 0:
                    break
                _lend_one(lending, loans, (rank, place, best))
                num_live = _drop(loans, best, num_live)
            before_us = loans.ends_us[place] = loans.starts_us[place] + took_us
            if task < num_works and lending.num_layers[number] > 0 and loans.backward[number] >= 0:
                loans.live[num_live] = number
                num_live += 1


@inlined
def _measure(
    order: TaskOrder,
    lending: Lending,
    times: tuple[FloatArray, FloatArray],
    loans: Loans,
    rank: int,
) -> None:
    """Places, times and memory of a rank with nothing lent."""
    starts_us, durations_us = times
    num_works = len(lending.stored_bytes)
    held = 0
    for place in range(order.first[rank], order.first[rank + 1]):
        task = order.task[place]
        number = task % num_works
        loans.starts_us[place] = starts_us[task]
        loans.ends_us[place] = starts_us[task] + durations_us[task]
        if task < num_works:
            loans.forward[number] = place
            held += lending.stored_bytes[number]
        elif task < 2 * num_works:
            loans.backward[number] = place
        loans.held_bytes[place] = held
        excess = max(0, held - lending.free_bytes[rank])
        loans.excess_bytes[place + 1] = loans.excess_bytes[place] + excess
        if lending.is_last[task]:
            held -= lending.stored_bytes[number]


@inlined
def _drop(loans: Loans, number: int, num_live: int) -> int:
    """Take a work off the live ones, if it is among them; how many are left."""
    for index in range(num_live):
        if loans.live[index] == number:
            loans.live[index] = loans.live[num_live - 1]
            return num_live - 1
    return num_live


@inlined
def _choose(lending: Lending, per_byte: FloatArray, loans: Loans, at: tuple[int, int, int]) -> int:
    """The live work to lend at a place; -1 where recomputing takes less time than waiting."""
    rank, place, num_live = at
    over = loans.held_bytes[place] - lending.free_bytes[rank]
    best, best_cost, best_benefit = -1, 0.0, 1.0
    for index in range(num_live):
        number = loans.live[index]
        size = lending.layer_bytes[number]
        count = min(lending.num_layers[number], (over + size - 1) // size)
        copy_us = lending.latency_us + count * size / lending.bytes_per_us
        ready_us = loans.ends_us[loans.forward[number]]
        out_us = _first_gap(lending, loans, (number, place), ready_us, copy_us)
        end_us = out_us + copy_us
        wait_us = max(0.0, end_us - loans.starts_us[place])
        num_bytes = count * size
        if wait_us > per_byte[number] * num_bytes:
            continue
        benefit = num_bytes * (
            1.0 + loans.excess_bytes[loans.backward[number]] - loans.excess_bytes[place]
        )
        cost = wait_us + _LINK_PRICE * copy_us
        # Quotients compared as products.
        if best < 0 or cost * best_benefit < best_cost * benefit:
            best, best_cost, best_benefit = number, cost, benefit
    return best


@inlined
def _lend_one(lending: Lending, loans: Loans, at: tuple[int, int, int]) -> None:
    """Lend layers of a work at a place, as many as help up to its backward; none where none do."""
    rank, place, number = at
    size = lending.layer_bytes[number]
    over = loans.held_bytes[place] - lending.free_bytes[rank]
    wanted = min(lending.num_layers[number], (over + size - 1) // size)
    most = over
    host_most = 0
    for later in range(loans.forward[number], loans.backward[number] + 1):
        host_most = max(host_most, loans.host_bytes[later])
        if place <= later < loans.backward[number]:
            most = max(most, loans.held_bytes[later] - lending.free_bytes[rank])
    ready_us = loans.ends_us[loans.forward[number]]
    shortest_us = lending.latency_us + wanted * size / lending.bytes_per_us
    out_us = _first_gap(lending, loans, (number, place), ready_us, shortest_us)
    # More than is needed here, as far as nobody waits for it.
    room_us = loans.starts_us[place] - out_us - lending.latency_us
    after = _index(loans, 0, out_us)
    if after < loans.num_copies[0]:
        room_us = min(room_us, loans.link_from_us[0, after] - out_us - lending.latency_us)
    in_time = int(max(0.0, room_us) * lending.bytes_per_us / size)
    count = max(wanted, min((most + size - 1) // size, in_time))
    count = min(count, lending.num_layers[number])
    count = min(count, (lending.host_bytes[rank] - host_most) // size)
    if count <= 0:
        return
    copy_us = lending.latency_us + count * size / lending.bytes_per_us
    backward = loans.backward[number]
    back_us = _last_gap(lending, loans, (number, place), copy_us)
    back = backward
    while back > place and loans.ends_us[back - 1] > back_us:
        back -= 1
    if back <= place:
        return
    out = loans.forward[number] + 1
    while out < place and loans.ends_us[out] <= out_us:
        out += 1
    loans.num_layers[number] = count
    loans.out[number], loans.free[number], loans.back[number] = out, place, back
    loans.out_us[number], loans.back_us[number] = out_us, back_us
    _occupy(loans, 0, out_us, copy_us)
    _occupy(loans, 1, back_us, copy_us)
    for later in range(place, back):
        loans.held_bytes[later] -= count * size
    for later in range(out, backward + 1):
        loans.host_bytes[later] += count * size
    loans.starts_us[place] = max(loans.starts_us[place], out_us + copy_us)


@inlined
def _index(loans: Loans, side: int, time_us: float) -> int:
    """How many copies of a direction start before a time."""
    low, high = 0, loans.num_copies[side]
    while low < high:
        middle = (low + high) // 2
        if loans.link_from_us[side, middle] < time_us:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _first_gap(
    lending: Lending, loans: Loans, at: tuple[int, int], ready_us: float, copy_us: float
) -> float:
    """When a copy to the host can start at the earliest; infinite where it cannot in time."""
    number, place = at
    computing = loans.forward[number]
    start_us = ready_us
    while True:
        index = _index(loans, 0, start_us)
        if index > 0:
            start_us = max(start_us, loans.link_until_us[0, index - 1])
        while index < loans.num_copies[0] and loans.link_from_us[0, index] < start_us + copy_us:
            start_us = loans.link_until_us[0, index]
            index += 1
        if not lending.is_aligned:
            return start_us
        while computing < place and loans.ends_us[computing] < start_us:
            computing += 1
        if computing == place:
            return np.inf
        if loans.ends_us[computing] == start_us:
            return start_us
        start_us = loans.ends_us[computing]


@inlined
def _last_gap(lending: Lending, loans: Loans, at: tuple[int, int], copy_us: float) -> float:
    """When a copy from the host must start at the latest; below all times where it cannot."""
    number, place = at
    computing = loans.backward[number] - 1
    end_us = loans.starts_us[loans.backward[number]]
    while True:
        index = _index(loans, 1, end_us) - 1
        while index >= 0 and loans.link_until_us[1, index] > end_us - copy_us:
            end_us = min(end_us, loans.link_from_us[1, index])
            index -= 1
        start_us = end_us - copy_us
        if not lending.is_aligned:
            return start_us
        while computing >= place and loans.ends_us[computing] > start_us:
            computing -= 1
        if computing < place:
            return -np.inf
        if loans.ends_us[computing] == start_us:
            return start_us
        # Behind this computing, the copy ends a little earlier.
        start_us = loans.ends_us[computing]
        index = _index(loans, 1, start_us + copy_us) - 1
        if index < 0 or loans.link_until_us[1, index] <= start_us:
            return start_us
        end_us = start_us + copy_us


@inlined
def _occupy(loans: Loans, side: int, start_us: float, copy_us: float) -> None:
    place = _index(loans, side, start_us)
    for later in range(loans.num_copies[side], place, -1):
        loans.link_from_us[side, later] = loans.link_from_us[side, later - 1]
        loans.link_until_us[side, later] = loans.link_until_us[side, later - 1]
    loans.link_from_us[side, place] = start_us
    loans.link_until_us[side, place] = start_us + copy_us
    loans.num_copies[side] += 1
