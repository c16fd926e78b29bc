"""What a plan owner and its planner processes tell each other, and how it travels.

Both ends send frames: eight bytes with the length, then a pickled message.
"""

import pickle
import struct
from dataclasses import dataclass

from megatron_dip.costs import BatchSizes, ProblemBuilder
from megatron_dip.partition import Partition
from megatron_dip.planner.rounds import PlannerSettings

__all__ = [
    "Failed",
    "Forget",
    "Message",
    "Planned",
    "Ready",
    "Request",
    "Setup",
    "decode_frames",
    "encode_frame",
]

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """To the worker: how batches that follow are planned."""

    builder: ProblemBuilder
    partition: Partition
    settings: PlannerSettings


@dataclass(frozen=True, kw_only=True)
class Request:
    """To the worker: plan this batch."""

    number: int
    replicas: tuple[BatchSizes, ...]
    """Those that share the plan."""
    limit_ms: float


@dataclass(frozen=True, kw_only=True)
class Forget:
    """To the worker: the plan of a request is no longer wanted."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """From the worker: it has loaded what it needs."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """From the worker: the best plan so far, validated."""

    number: int
    packed: bytes
    """As :func:`megatron_dip.planner.pack_plan` makes it; empty where it is the one sent before."""
    is_last: bool
    is_searched: bool
    """As in :class:`megatron_dip.planner.RoundPlan`."""
    planning_ms: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """From the worker: this batch could not be planned, or not further."""

    number: int
    reason: str


Message = Setup | Request | Forget | Ready | Planned | Failed


def encode_frame(message: Message) -> bytes:
    """``message`` as bytes for the other end."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(content)) + content


def decode_frames(received: bytearray) -> list[Message]:
    """The complete messages in ``received``, which keeps what is left of an incomplete one."""
    messages: list[Message] = []
    while len(received) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(received)
        end = _LENGTH.size + length
        if len(received) < end:
            break
        messages.append(pickle.loads(received[_LENGTH.size : end]))
        del received[:end]
    return messages
