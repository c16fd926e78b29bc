"""What a rank's actions become on a GPU: kernels in streams, and in hardware queues.

The host puts kernels into streams in the order of the rank's list.  Computing has one stream.  A
*channel* (sender, receiver, direction) has some communicators, and each of them a stream on both
ranks; message k of a channel travels on communicator k modulo their number.  A kernel starts when

- the one before it in its stream has ended,
- what it waits for has ended: a send for the computing before it in the list, which made its data;
  computing for the receives that it reads.  A receive waits for no computing: it is posted from a
  stream of its own,
- and, with one hardware queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``), every kernel before it in the
  rank's list has *started*: what cannot start holds up all behind it.

Copies to and from the host have a stream each.  ``OFFLOAD`` and ``RELOAD`` wait for the computing
before them in the list; ``RELEASE`` stands in the stream of computing and takes no time, but waits
for its ``OFFLOAD``; the backward waits for its ``RELOAD``.

A transfer goes on once both of its kernels have started (rendezvous: neither side is buffered), and
ends for both a given time later.  So starts and ends are nodes of a graph.  If it has no cycle, no
choice of times can bring the ranks to rest for ever; the longest path to a node is its time.  What
runs under one queue also runs under several, whichever streams share them: every edge between
kernels of one queue follows from the order of starts.

Gradient reductions take no part.  One is put into its stream when the one before it is known to
have ended, so that it starts at once and holds up nothing; see ``docs/gpu_queues.md``.
"""

from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from megatron_dip.compiled import compiled, inlined
from megatron_dip.forms import Form
from megatron_dip.plan.numbers import TYPE_NUMBERS
from megatron_dip.plan.wiring import BoolArray, FloatArray, IntArray, Wiring

__all__ = [
    "ActionLists",
    "KernelTimes",
    "Kernels",
    "QueueModel",
    "communicator_numbers",
    "list_kernels",
    "run_kernels",
]

_F, _B, _I, _W, _SEND_F, _RECV_F, _SEND_B, _RECV_B, _REDUCE, _OFFLOAD, _RELEASE, _RELOAD = (
    TYPE_NUMBERS.values()
)


class QueueModel(Form):
    """The queues that a plan is made for; plans that name none run where every stream has one."""

    hardware_queues: Literal["one"] = "one"
    """Of every rank."""
    communicators: Annotated[int, Field(ge=1, le=32)] = 2
    """Of every channel, taken in turn."""


class ActionLists(NamedTuple):
    """The actions of all ranks as numbers, one rank after the other; T in all."""

    first: IntArray
    """[num_ranks + 1]: rank r has the actions first[r] to first[r + 1]."""
    rank: IntArray
    """[T]: of the list that the action stands in."""
    type: IntArray
    """[T]: see ``TYPE_NUMBERS``."""
    number: IntArray
    """[T]: of the work (computing, copies), message (transfer) or place of a stage (reduction)."""


class Kernels(NamedTuple):
    """What the actions wait for; T actions, E pairs of one and another that waits for its end."""

    rank: IntArray
    """[T]"""
    before: IntArray
    """[T]: the kernel before it in its stream, whose end it waits for; -1 for none."""
    after: IntArray
    """[T]: the one behind it in its stream; -1 for none."""
    behind: IntArray
    """[T]: the one behind it in its hardware queue, which waits for its start; -1 for none."""
    other_side: IntArray
    """[T]: the receive of a send and vice versa, -1 for what is no transfer."""
    first_waiting: IntArray
    """[T + 1]: kernels first_waiting[t] to first_waiting[t + 1] of ``waiting`` wait for t's end."""
    waiting: IntArray
    """[E]"""


class KernelTimes(NamedTuple):
    """When kernels run, in microseconds from the start of the batch."""

    starts_us: FloatArray
    """[T]"""
    ends_us: FloatArray
    """[T]"""
    has_started: BoolArray
    """[T]: False for what never can."""
    is_done: BoolArray
    """[T]: False also for transfers of which one side never starts."""


def communicator_numbers(channel: IntArray, num_communicators: int) -> tuple[IntArray, IntArray]:
    """For transfers in the order of their list: which communicator of its channel each one takes,
    and the index of the transfer before it on the same one, -1 for none.

    Args:
        channel: [N] any number for the channel of each transfer.
        num_communicators: Of every channel.
    """
    by_channel = np.argsort(channel, kind="stable")
    grouped = channel[by_channel]
    turn = np.arange(len(channel)) - np.searchsorted(grouped, grouped)
    before = np.full(len(channel), -1)
    has_one = np.flatnonzero(turn >= num_communicators)
    before[by_channel[has_one]] = by_channel[has_one - num_communicators]
    numbers = np.empty_like(turn)
    numbers[by_channel] = turn % num_communicators
    return numbers, before


def list_kernels(
    wiring: Wiring,
    lists: ActionLists,
    num_communicators: int,
    *,
    hardware_queues: Literal["one", "many"] = "one",
) -> Kernels:
    """The kernels of ``lists``, which must hold every action of the batch once.

    Args:
        wiring: The dependencies of the batch.
        lists: What every rank runs, in order.
        num_communicators: Of every channel.
        hardware_queues: Of every rank; with many, each stream has one.
    """
    num_actions = len(lists.type)
    at = _positions(wiring, lists)
    other_side = np.full(num_actions, -1)
    for send, receive in (at.moved[:2], at.moved[2:]):
        moves = send >= 0
        other_side[send[moves]], other_side[receive[moves]] = receive[moves], send[moves]
    before = np.full(num_actions, -1)
    computes = np.flatnonzero(_in_computing_stream(lists))
    offloads, reloads = (np.flatnonzero(lists.type == kind) for kind in (_OFFLOAD, _RELOAD))
    transfers = np.flatnonzero(other_side >= 0)
    peer = lists.rank[other_side[transfers]]
    # The four types of transfers keep sides and directions apart.
    channel = (lists.rank[transfers] * len(lists.first) + peer) * len(TYPE_NUMBERS)
    for stream, members, turns in (
        (lists.rank[computes], computes, 1),
        (lists.rank[offloads], offloads, 1),
        (lists.rank[reloads], reloads, 1),
        (channel + lists.type[transfers], transfers, num_communicators),
    ):
        _, previous = communicator_numbers(stream, turns)
        before[members] = np.where(previous >= 0, members[previous], -1)
    after, behind = np.full(num_actions, -1), np.full(num_actions, -1)
    after[before[before >= 0]] = np.flatnonzero(before >= 0)
    if hardware_queues == "one":
        behind[:-1] = np.where(lists.rank[1:] == lists.rank[:-1], np.arange(1, num_actions), -1)
    ended, waiting = _waits(wiring, lists, at)
    by_ended = np.argsort(ended, kind="stable")
    return Kernels(
        rank=lists.rank,
        before=before,
        after=after,
        behind=behind,
        other_side=other_side,
        first_waiting=np.searchsorted(ended[by_ended], np.arange(num_actions + 1)),
        waiting=waiting[by_ended],
    )


def _in_computing_stream(lists: ActionLists) -> BoolArray:
    """[T]: computing, and what makes it wait for a copy."""
    return (lists.type < _SEND_F) | (lists.type == _RELEASE)


class _Positions(NamedTuple):
    """Where actions stand, -1 where they do not."""

    forward: IntArray
    """[N]"""
    backward: IntArray
    """[N]: ``B`` or ``I``."""
    moved: IntArray
    """[4, M]: both sides of every message, then of its gradient."""
    copied: IntArray
    """[3, N]: ``OFFLOAD``, ``RELEASE``, ``RELOAD``."""


def _positions(wiring: Wiring, lists: ActionLists) -> _Positions:
    computed = np.full((4, len(wiring.stage)), -1)
    moved = np.full((4, len(wiring.source)), -1)
    copied = np.full((3, len(wiring.stage)), -1)
    places = [*computed, *moved, None, *copied]
    for kind, into in enumerate(places):
        if into is not None:
            index = np.flatnonzero(lists.type == kind)
            into[lists.number[index]] = index
    return _Positions(computed[_F], np.maximum(computed[_B], computed[_I]), moved, copied)


def _waits(wiring: Wiring, lists: ActionLists, at: _Positions) -> tuple[IntArray, IntArray]:
    """Pairs of actions of one rank, of which the second starts after the end of the first."""
    message = np.repeat(np.arange(len(wiring.source)), np.diff(wiring.first_reader))
    is_read = np.flatnonzero(at.moved[1][message] >= 0)
    sends = np.flatnonzero((lists.type == _SEND_F) | (lists.type == _SEND_B))
    returns = np.flatnonzero(at.moved[3] >= 0)
    places = np.where(_in_computing_stream(lists), np.arange(len(lists.type)), -1)
    last_computing = np.maximum.accumulate(places)
    copies = np.flatnonzero((lists.type == _OFFLOAD) | (lists.type == _RELOAD))
    offload, release, reload = at.copied
    released, reloaded = np.flatnonzero(release >= 0), np.flatnonzero(reload >= 0)
    pairs = (
        (last_computing[sends], sends),
        (last_computing[copies], copies),
        (at.moved[1][message[is_read]], at.forward[wiring.reader[is_read]]),
        (at.moved[3][returns], at.backward[wiring.source[returns]]),
        (offload[released], release[released]),
        (reload[reloaded], at.backward[reloaded]),
    )
    ended, waiting = zip(*pairs, strict=True)
    return np.concatenate(ended), np.concatenate(waiting)


def run_kernels(kernels: Kernels, duration_us: FloatArray) -> KernelTimes:
    """The earliest times of all kernels that ever run.

    Args:
        kernels: What waits for what.
        duration_us: [T] of computing and copies; of a transfer, from the start of its later side.
    """
    num_actions = len(duration_us)
    times = KernelTimes(
        starts_us=np.zeros(num_actions),
        ends_us=np.zeros(num_actions),
        has_started=np.zeros(num_actions, dtype=bool),
        is_done=np.zeros(num_actions, dtype=bool),
    )
    _run(kernels, duration_us, times, np.zeros(num_actions, np.int64), np.empty_like(kernels.rank))
    return times


@compiled
def _run(
    kernels: Kernels,
    duration_us: FloatArray,
    times: KernelTimes,
    num_waiting: IntArray,
    ready: IntArray,
) -> None:
    """Start every kernel once all that it waits for has come; see :func:`run_kernels`.

    Args:
        kernels: What waits for what.
        duration_us: [T]
        times: Zeros, raised to what is found.
        num_waiting: [T] zeros.
        ready: [T] room for the kernels that start, in an order that respects what they wait for.
    """
    for kernel in range(len(num_waiting)):
        for follower in (kernels.after[kernel], kernels.behind[kernel]):
            if follower >= 0:
                num_waiting[follower] += 1
    for kernel in kernels.waiting:
        num_waiting[kernel] += 1
    num_ready = 0
    for kernel in range(len(num_waiting)):
        if num_waiting[kernel] == 0:
            ready[num_ready] = kernel
            num_ready += 1
    place = 0
    while place < num_ready:
        kernel = ready[place]
        place += 1
        times.has_started[kernel] = True
        start_us = times.starts_us[kernel]
        if kernels.behind[kernel] >= 0:
            num_ready = _arrive(
                kernels.behind[kernel], start_us, times, (num_waiting, ready, num_ready)
            )
        other = kernels.other_side[kernel]
        if other < 0:
            end_us = start_us + duration_us[kernel]
            num_ready = _end(kernels, kernel, end_us, times, (num_waiting, ready, num_ready))
        elif times.has_started[other]:
            end_us = max(start_us, times.starts_us[other]) + duration_us[kernel]
            num_ready = _end(kernels, kernel, end_us, times, (num_waiting, ready, num_ready))
            num_ready = _end(kernels, other, end_us, times, (num_waiting, ready, num_ready))


@inlined
def _end(
    kernels: Kernels,
    kernel: int,
    end_us: float,
    times: KernelTimes,
    state: tuple[IntArray, IntArray, int],
) -> int:
    """The end of a kernel; how many have started."""
    num_waiting, ready, num_ready = state
    times.ends_us[kernel] = end_us
    times.is_done[kernel] = True
    if kernels.after[kernel] >= 0:
        num_ready = _arrive(kernels.after[kernel], end_us, times, (num_waiting, ready, num_ready))
    for index in range(kernels.first_waiting[kernel], kernels.first_waiting[kernel + 1]):
        waiting = kernels.waiting[index]
        num_ready = _arrive(waiting, end_us, times, (num_waiting, ready, num_ready))
    return num_ready


@inlined
def _arrive(
    kernel: int, time_us: float, times: KernelTimes, state: tuple[IntArray, IntArray, int]
) -> int:
    """One thing less that ``kernel`` waits for; how many have started."""
    num_waiting, ready, num_ready = state
    times.starts_us[kernel] = max(times.starts_us[kernel], time_us)
    num_waiting[kernel] -= 1
    if num_waiting[kernel] == 0:
        ready[num_ready] = kernel
        return num_ready + 1
    return num_ready
