"""Where receives stand in the lists of ranks with one hardware queue.

A receive that is put into its stream while the one before it waits for its message holds up
everything behind it.  So it goes behind the computing during which the one before it on its
communicator ends, at the earliest to where lowering puts it, that is before the computing during
which its message is sent.

Times decide where that is, those of the lists so far.  With these times as starts and ends, the new
lists keep every rule of the queue model: a receive is moved to between the end of the one before
it and its own start so far.  So the new lists cannot come to rest, and are no slower; where nothing
gets faster any more the search ends.  It begins with times for many queues, from which it is found
at once where transfers do not crowd.  These break rules of one queue; where the lists made of them
come to rest it begins with the lists as they are.
"""

import numpy as np

from megatron_dip.plan.actions import ActionType
from megatron_dip.plan.numbers import TYPE_NUMBERS
from megatron_dip.plan.queues import (
    ActionLists,
    Kernels,
    KernelTimes,
    list_kernels,
    run_kernels,
)
from megatron_dip.plan.wiring import FloatArray, IntArray, Wiring

__all__ = ["place_receives", "rearranged"]

_MOST_ROUNDS = 12
_LEAST_GAIN = 1e-4
"""Of the time, for which another round is run."""
_FIRST_TRANSFER = TYPE_NUMBERS[ActionType.SEND_FORWARD]
_REDUCE = TYPE_NUMBERS[ActionType.REDUCE_GRAD]
_RECEIVES = (TYPE_NUMBERS[ActionType.RECV_FORWARD], TYPE_NUMBERS[ActionType.RECV_BACKWARD])


def rearranged(lists: ActionLists, order: IntArray) -> ActionLists:
    """The actions at ``order`` ([T]), which keeps every rank's actions together."""
    return lists._replace(type=lists.type[order], number=lists.number[order])


def place_receives(
    wiring: Wiring, lists: ActionLists, duration_us: FloatArray, num_communicators: int
) -> IntArray:
    """The order of ``lists`` for one hardware queue, as indices of its actions.

    Args:
        wiring: The dependencies of the batch.
        lists: In an order in which nothing comes to rest though every transfer waits for its other
            side, as lowering makes it.
        duration_us: [T] what actions take; see :func:`megatron_dip.plan.queues.run_kernels`.
        num_communicators: Of every channel.
    """

    def run(order: IntArray) -> KernelTimes:
        """Times under one queue, by the numbers of ``lists``."""
        kernels = list_kernels(wiring, rearranged(lists, order), num_communicators)
        found = run_kernels(kernels, duration_us[order])
        times = KernelTimes(
            np.empty_like(found.starts_us),
            np.empty_like(found.ends_us),
            np.empty_like(found.has_started),
            np.empty_like(found.is_done),
        )
        for into, values in zip(times, found, strict=True):
            into[order] = values
        return times

    kernels = list_kernels(wiring, lists, num_communicators, hardware_queues="many")
    best = np.arange(len(duration_us))
    times = run(best)
    placed = _placed(lists, kernels, run_kernels(kernels, duration_us))
    for _ in range(_MOST_ROUNDS):
        found = run(placed)
        if found.is_done.all():
            gain = 1 - found.ends_us.max(initial=0.0) / max(times.ends_us.max(initial=0.0), 1e-9)
            if gain > 0:
                best, times = placed, found
            if gain <= _LEAST_GAIN:
                break
        placed = _placed(lists, kernels, times)
    return best


def _placed(lists: ActionLists, kernels: Kernels, times: KernelTimes) -> IntArray:
    """The order that follows from times, by the numbers of ``lists``."""
    num_actions = len(lists.type)
    computes = lists.type < _FIRST_TRANSFER
    receives = np.isin(lists.type, _RECEIVES)
    # A slot is behind so many computing actions of its rank.
    slot, time_us = np.zeros(num_actions, np.int64), np.full(num_actions, np.inf)
    for start, end in zip(lists.first[:-1], lists.first[1:], strict=True):
        here = np.arange(start, end)
        slot[here] = np.cumsum(computes[here])
        starts_us = times.starts_us[here[computes[here]]]
        # Sends and copies keep their order: it says what is held.
        others = here[~computes[here] & ~receives[here] & (lists.type[here] != _REDUCE)]
        time_us[others] = np.maximum.accumulate(times.starts_us[others])
        own = here[receives[here]]
        free_us = _free_us(lists, kernels, times, own)
        slot[own] = np.maximum(slot[own], np.searchsorted(starts_us, free_us, side="right"))
        begin_us = np.concatenate([[-np.inf], starts_us])[slot[own]]
        time_us[own] = np.maximum(free_us, begin_us)
    time_us[computes] = -np.inf
    return np.lexsort((np.arange(num_actions), ~receives, time_us, slot, lists.rank))


def _free_us(
    lists: ActionLists, kernels: Kernels, times: KernelTimes, receives: IntArray
) -> FloatArray:
    """When the communicators of one rank's ``receives`` are free for them, in a channel's order."""
    before = kernels.before[receives]
    free_us = np.where(before >= 0, times.ends_us[before], 0.0)
    sender = lists.rank[kernels.other_side[receives]] * len(TYPE_NUMBERS) + lists.type[receives]
    for channel in np.unique(sender):
        members = sender == channel
        free_us[members] = np.maximum.accumulate(free_us[members])
    return free_us
