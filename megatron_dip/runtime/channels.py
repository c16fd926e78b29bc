"""Ordered point-to-point channels between the ranks of one pipeline.

A channel leads from one rank to another in one direction of the pipeline: outputs forward or
gradients backward.  Each has process groups of its own, so that messages of one channel cannot
be taken for those of another, and on each both sides post in the order that the plan fixes; of
several groups of a channel the messages take one after the other.  Receives are posted ahead and
waited for when their data is needed; sends are posted and retired later, so that computing never
waits for a send.

NCCL puts a transfer into a stream of its group, behind what is in the current stream at that
moment.  For a send that is what makes its data.  A receive need not wait for computing, so it is
posted from a stream of its own.

CUDA tensors over a gloo group are staged through pinned host memory: several ranks can then
share one GPU, which NCCL refuses.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_dip.errors import ChannelError
from megatron_dip.plan import Channel, Message

__all__ = [
    "Channels",
    "Receive",
    "create_channel_groups",
    "transfer_failure_reason",
]

_LARGEST_TAG = 2**31 - 1
_CONNECTION_LOST = re.compile("connection (closed|reset|refused)|reset by peer|broken pipe", re.I)
_TIMED_OUT = re.compile("timed out|timeout", re.I)


def create_channel_groups(
    channels: Sequence[Channel],
    pipelines: Sequence[Sequence[int]],
    timeout_seconds: float,
    backend: str | None = None,
    num_communicators: int = 1,
) -> dict[Channel, tuple[dist.ProcessGroup, ...]]:
    """The process groups of this process's pipeline; a collective call of the whole world.

    Args:
        channels: The channels of one pipeline.
        pipelines: Global ranks of every pipeline, in order of pipeline rank; the same on all ranks.
        timeout_seconds: Limit of every wait on these groups.
        backend: As in ``torch.distributed.new_group``.
        num_communicators: Groups of every channel.

    ``use_local_synchronization`` would spare ranks the calls for groups that they are not in, but
    it names groups by a counter that only members advance, so that two ranks with different
    neighbours disagree on the names of their groups.  A call by a non-member costs microseconds.
    """
    own: dict[Channel, tuple[dist.ProcessGroup, ...]] = {}
    for pipeline in pipelines:
        for channel in channels:
            members = [pipeline[channel.sender], pipeline[channel.receiver]]
            for number in range(num_communicators):
                group = dist.new_group(
                    members,
                    timeout=timedelta(seconds=timeout_seconds),
                    backend=backend,
                    pg_options=_group_options(backend or dist.get_backend()),
                    group_desc=f"dip: {channel}, {number}",
                )
                if isinstance(group, dist.ProcessGroup) and dist.get_rank() in members:
                    own[channel] = (*own.get(channel, ()), group)
    return own


def _group_options(backend: str) -> Any:
    """New ones for every group: torch writes the group's name and ranks into them, and its records
    of transfers read them there."""
    if backend != "nccl":
        return None
    # Streams from another pool than those of collectives: torch has 32 of each priority, and groups
    # beyond them share one.
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


class _Link(NamedTuple):
    """A channel that this rank sends or receives on, with all that a transfer on it needs."""

    channel: Channel
    group: dist.ProcessGroup
    peer: int
    """Global rank of the other end."""
    is_staged: bool
    """Through host memory: the tensors are on a GPU, the group is for CPUs."""
    says_when_ended: bool
    """A gloo transfer never says that it has ended; it is known from what follows it."""


class _Send(NamedTuple):
    """A message on its way; its tensor lives until it is retired."""

    message: Message
    link: _Link
    tensor: torch.Tensor
    work: dist.Work | None


class Receive(NamedTuple):
    """A posted receive and the buffer that it fills."""

    message: Message
    link: _Link
    buffer: torch.Tensor
    work: dist.Work | None


class Channels:
    """Posts, waits for and retires the transfers of one rank.

    Args:
        rank: Pipeline rank of this process.
        pipeline: Global ranks of its pipeline.
        groups: See :func:`create_channel_groups`.
        device: Where the stages compute.
        timeout_seconds: Limit of every wait.
    """

    def __init__(
        self,
        *,
        rank: int,
        pipeline: Sequence[int],
        groups: Mapping[Channel, Sequence[dist.ProcessGroup]],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.device = device
        self._timeout = timedelta(seconds=timeout_seconds)
        # By the tuple that a channel is: making one for every message would cost more.
        self._links: dict[tuple[int, int, bool], tuple[_Link, ...]] = {}
        for channel, own in groups.items():
            peer = pipeline[channel.receiver if channel.sender == rank else channel.sender]
            self._links[channel] = tuple(_link(channel, group, peer, device) for group in own)
        self._turns: dict[tuple[int, int, bool], int] = {}
        """Messages of every channel since :meth:`begin`."""
        self._num_communicators = 1
        everywhere = [link for links in self._links.values() for link in links]
        self._any_says_when_ended = any(link.says_when_ended for link in everywhere)
        on_device = self._any_says_when_ended and device.type == "cuda"
        self._receiving = torch.cuda.Stream(device) if on_device else None
        self._in_flight: dict[Message, _Send] = {}
        self._failure: str | None = None

    def connect(self) -> None:
        """Send one element over every channel; all ranks of the pipeline call it before they run.

        NCCL makes a communicator at its first transfer and holds the host until the other end comes
        too.  A receive that is posted ahead of its data would wait there for a rank that waits
        elsewhere.  Here all ranks come to their channels in one order, so no wait closes a circle.

        Raises:
            ChannelError: A peer died, or did not come within the time limit.
        """
        in_order = sorted(self._links.items(), key=itemgetter(0))
        for channel, link in ((channel, link) for channel, links in in_order for link in links):
            element = torch.zeros(1, device="cpu" if link.is_staged else self.device)
            try:
                if link.channel.sender == self.rank:
                    work = dist.isend(element, dst=link.peer, group=link.group)
                else:
                    work = dist.irecv(element, src=link.peer, group=link.group)
                self._end(work, link)
            except RuntimeError as error:
                raise ChannelError(
                    f"rank {self.rank}: the channel {Channel(*channel)} could not be opened: "
                    f"{transfer_failure_reason(error)}"
                ) from error

    def begin(self, num_communicators: int) -> None:
        """Let messages take so many communicators of each channel in turn, from the first one on.

        Raises:
            ChannelError: Channels have fewer.
        """
        fewest = min((len(links) for links in self._links.values()), default=num_communicators)
        if num_communicators > fewest:
            raise ChannelError(
                f"rank {self.rank}: the plan takes {num_communicators} communicators of each "
                f"channel (expected at most {fewest}, which this run has made: plan for the "
                f"hardware queues of this run)"
            )
        self._turns.clear()
        self._num_communicators = num_communicators

    def _next_link(self, channel: tuple[int, int, bool]) -> _Link:
        turn = self._turns.get(channel, 0)
        self._turns[channel] = turn + 1
        return self._links[channel][turn % self._num_communicators]

    def abandon(self, failure: str) -> None:
        """Refuse every later run: messages of the failed one may still lie in the channels."""
        self._failure = self._failure or failure.splitlines()[0]

    def check_usable(self) -> None:
        """
        Raises:
            ChannelError: An earlier run on these channels failed.
        """
        if self._failure is not None:
            raise ChannelError(
                f"rank {self.rank}: its channels still hold messages of a run that failed (start "
                f"the processes again); it was: {self._failure}"
            )

    def send(self, message: Message, receiver: int, tensor: torch.Tensor) -> None:
        """Post ``message``; returns at once.

        Args:
            message: Which one it is; see :meth:`wait_send`.
            receiver: Pipeline rank.
            tensor: Without a graph; not to be changed before the send has ended.

        Raises:
            ChannelError: The peer died.
        """
        link = self._next_link((self.rank, receiver, message.is_gradient))
        tensor = tensor.contiguous()
        if link.is_staged:
            staged = torch.empty_like(tensor, device="cpu", pin_memory=True)
            staged.copy_(tensor, non_blocking=True)
            # gloo reads the buffer from the host's side: the copy must have ended.
            torch.cuda.current_stream(self.device).synchronize()
            tensor = staged
        try:
            work = dist.isend(tensor, dst=link.peer, group=link.group, tag=_tag(message))
        except RuntimeError as error:
            raise self._error(error, message, link.channel) from error
        self._in_flight[message] = _Send(message, link, tensor, work)

    def post_receive(
        self, message: Message, sender: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Receive:
        """Post a receive of ``message`` into a new buffer; returns at once.

        Raises:
            ChannelError: The peer died.
        """
        link = self._next_link((sender, self.rank, message.is_gradient))
        device = "cpu" if link.is_staged else self.device
        try:
            # The buffer belongs to the stream in which it is filled, not to the computing that may
            # still use the memory which the current stream would hand out.
            with nullcontext() if self._receiving is None else torch.cuda.stream(self._receiving):
                buffer = torch.empty(shape, dtype=dtype, device=device, pin_memory=link.is_staged)
                work = dist.irecv(buffer, src=link.peer, group=link.group, tag=_tag(message))
        except RuntimeError as error:
            raise self._error(error, message, link.channel) from error
        return Receive(message, link, buffer, work)

    def wait_receive(self, receive: Receive) -> torch.Tensor:
        """The received tensor, on the computing device.

        Raises:
            ChannelError: The peer died, or nothing came within the time limit.
        """
        self._wait(receive)
        if receive.link.is_staged:
            return receive.buffer.to(self.device, non_blocking=True)
        if self._receiving is not None:
            # Its memory is handed out again once what reads it here has ended.
            receive.buffer.record_stream(torch.cuda.current_stream(self.device))
        return receive.buffer

    def wait_send(self, message: Message) -> None:
        """Retire the send of ``message``, if there is one: returns when its buffer may be freed."""
        send = self._in_flight.pop(message, None)
        if send is not None:
            self._wait(send)

    def retire_completed(self) -> None:
        """Free the buffers of sends that are known to have ended, without waiting."""
        if not self._any_says_when_ended:
            return
        self._in_flight = {
            message: send
            for message, send in self._in_flight.items()
            if not (send.link.says_when_ended and send.work and send.work.is_completed())
        }

    def drain(self) -> None:
        """Wait until every send has ended: the end of an iteration."""
        for message in list(self._in_flight):
            self.wait_send(message)

    def _wait(self, transfer: _Send | Receive) -> None:
        message, link, _, work = transfer
        start = time.monotonic()
        try:
            self._end(work, link)
        except RuntimeError as error:
            after = (
                f" after {time.monotonic() - start:.1f} s "
                f"(limit {self._timeout.total_seconds():g} s)"
            )
            raise self._error(error, message, link.channel, after) from error

    def _end(self, work: dist.Work | None, link: _Link) -> None:
        if work is None:
            return
        if link.says_when_ended:
            # Orders the stream only; the group's own watchdog holds the time limit.
            work.wait()
        else:
            work.wait(self._timeout)

    def _error(
        self, error: RuntimeError, message: Message, channel: Channel, after: str = ""
    ) -> ChannelError:
        action = message.receive if channel.receiver == self.rank else message.send
        return ChannelError(
            f"rank {self.rank}: {action} on the channel {channel} failed{after}: "
            f"{transfer_failure_reason(error)}"
        )


def _link(channel: Channel, group: dist.ProcessGroup, peer: int, device: torch.device) -> _Link:
    is_gloo = dist.get_backend(group) == "gloo"
    return _Link(
        channel=channel,
        group=group,
        peer=peer,
        is_staged=is_gloo and device.type == "cuda",
        says_when_ended=not is_gloo,
    )


def _tag(message: Message) -> int:
    """Gloo matches by tag as well, so that after a lost message the next one is not taken for it:
    of another size it would end the process, of the same size give wrong results.
    """
    # The hash of a tuple of numbers is the same in all processes.
    return hash(message) & _LARGEST_TAG


def transfer_failure_reason(error: RuntimeError) -> str:
    """What an error of torch.distributed means for a user, and what to do."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if _CONNECTION_LOST.search(text):
        return "the other process has ended or given up (see its log for the cause)"
    if _TIMED_OUT.search(text):
        return (
            "nothing came: the other process is stuck or far behind "
            "(see its log; if it is only slow, raise --dip-timeout-seconds)"
        )
    return text
