"""Channels: between which ranks messages pass, and how many communicators each of them gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from megatron_dip.partition import Partition
from megatron_dip.plan.queues import QueueModel

__all__ = ["Channel", "one_queue_model", "pipeline_channels"]

# Streams of one priority that torch has for a device.  Beyond them communicators share streams, and
# wait for one another in a way that no plan knows of.
_NUM_STREAMS = 32
# With 1 the plans of the five models take up to 0.8 % longer than with many hardware queues, with 2
# up to 0.4 %, with 4 up to 0.15 %; every communicator takes memory on both ends.
_COMMUNICATORS = 2


class Channel(NamedTuple):
    """From pipeline rank ``sender`` to pipeline rank ``receiver``."""

    sender: int
    receiver: int
    is_gradient: bool

    def __str__(self) -> str:
        carried = "gradients" if self.is_gradient else "outputs"
        return f"rank {self.sender} to rank {self.receiver} ({carried})"


def pipeline_channels(
    partition: Partition, upstream: Mapping[str, Sequence[str]]
) -> tuple[Channel, ...]:
    """Every channel that a batch can use under ``partition``, in one order for all ranks.

    Args:
        partition: The stages.
        upstream: For each module the modules that it reads.
    """
    links: set[tuple[int, int]] = set()
    for chain in partition.chains.values():
        links.update((a.rank, b.rank) for a, b in pairwise(chain))
    for module, sources in upstream.items():
        entry = partition.first_stage(module).rank
        links.update((partition.last_stage(source).rank, entry) for source in sources)
    crossing = [(a, b) for a, b in links if a != b]
    forward = [Channel(a, b, False) for a, b in crossing]
    backward = [Channel(b, a, True) for a, b in crossing]
    return tuple(sorted(forward + backward))


def one_queue_model(partition: Partition, upstream: Mapping[str, Sequence[str]]) -> QueueModel:
    """What plans for ranks with one hardware queue are made for: as many communicators as pay, and
    as have streams of their own on every rank."""
    ends = Counter(
        rank
        for channel in pipeline_channels(partition, upstream)
        for rank in (channel.sender, channel.receiver)
    )
    most = max(ends.values(), default=1)
    return QueueModel(communicators=max(1, min(_COMMUNICATORS, _NUM_STREAMS // most)))
