"""Pipeline actions: the vocabulary shared by planner, simulator and executor.

One action is written ``<stage><TYPE><microbatch>[.<sub>]``; sends name the stage they send to
(``3SEND_F12.1>4``), receives the stage they receive from (``4RECV_F12.1<3``), and ``REDUCE_GRAD``
stands for a whole stage (``3REDUCE_GRAD``).  ``3OFFLOAD12.1``, ``3RELEASE12.1`` and ``3RELOAD12.1``
move activations of a work to the memory of the host and back.  The sub-microbatch of a transfer is
that of the upstream module, in both directions.  The form follows
``torch.distributed.pipelining``; it is the one used in plan files, logs, traces, golden tests and
error messages.
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from megatron_dip.errors import PlanError, shown

__all__ = ["COMPUTE_TYPES", "COPY_TYPES", "Action", "ActionType", "format_actions", "parse_actions"]


class ActionType(StrEnum):
    """What a rank does; the values are the names used in action text."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECV_BACKWARD = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"
    OFFLOAD = "OFFLOAD"
    """Begins the copy of activations to the host."""
    RELEASE = "RELEASE"
    """Computing behind it waits for the end of that copy; their memory is free from here."""
    RELOAD = "RELOAD"
    """Takes memory for them again and begins the copy back, which their backward waits for."""

    @property
    def is_compute(self) -> bool:
        return self in COMPUTE_TYPES

    @property
    def is_copy(self) -> bool:
        return self in COPY_TYPES

    @property
    def is_send(self) -> bool:
        return self in _SEND_TYPES

    @property
    def is_receive(self) -> bool:
        return self in _RECEIVE_TYPES


COMPUTE_TYPES = frozenset(
    {ActionType.FORWARD, ActionType.BACKWARD, ActionType.INPUT_GRAD, ActionType.WEIGHT_GRAD}
)

COPY_TYPES = frozenset({ActionType.OFFLOAD, ActionType.RELEASE, ActionType.RELOAD})

_SEND_TYPES = frozenset({ActionType.SEND_FORWARD, ActionType.SEND_BACKWARD})
_RECEIVE_TYPES = frozenset({ActionType.RECV_FORWARD, ActionType.RECV_BACKWARD})

# Longest names first, so that SEND_F is not read as an action of type F.
_TYPES = "|".join(sorted((kind.value for kind in ActionType), key=len, reverse=True))
_NUMBER = r"(\d{1,100})"
_PATTERN = re.compile(rf"{_NUMBER}({_TYPES})(?:{_NUMBER}(?:\.{_NUMBER})?)?(?:([<>]){_NUMBER})?")


class Action(NamedTuple):
    """One step of one rank."""

    stage: int
    type: ActionType
    microbatch: int | None = None
    """None for REDUCE_GRAD only."""
    sub: int = 0
    peer: int | None = None
    """Stage at the other end of a transfer; None for everything else."""

    def __str__(self) -> str:
        text = f"{self.stage}{self.type.value}"
        if self.microbatch is not None:
            text += str(self.microbatch)
        if self.sub:
            text += f".{self.sub}"
        if self.peer is not None:
            text += f"{'>' if self.type.is_send else '<'}{self.peer}"
        return text

    @classmethod
    # The plan of every step has much the same actions as the one before it.
    @lru_cache(maxsize=1 << 16)
    def parse(cls, text: str) -> "Action":
        """The action written as ``text``.

        Raises:
            PlanError: ``text`` is not an action.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise PlanError(
                f"not a pipeline action: {shown(text)} (expected e.g. '3F12', '3F12.1' or "
                f"'3SEND_F12>4')"
            )
        stage, name, microbatch, sub, arrow, peer = match.groups()
        kind = ActionType(name)
        expected_arrow = ">" if kind.is_send else "<" if kind.is_receive else None
        if arrow != expected_arrow or (microbatch is None) != (kind is ActionType.REDUCE_GRAD):
            raise PlanError(
                f"not a pipeline action: {shown(text)} (a send names its target as '>4', a receive "
                f"its source as '<4', and all but REDUCE_GRAD name a microbatch)"
            )
        return cls(
            stage=int(stage),
            type=kind,
            microbatch=None if microbatch is None else int(microbatch),
            sub=int(sub or 0),
            peer=None if peer is None else int(peer),
        )


def format_actions(actions: Iterable[Action]) -> str:
    """One rank's actions as one line."""
    return " ".join(str(action) for action in actions)


def parse_actions(text: str) -> tuple[Action, ...]:
    """The actions of one rank from one line; raises PlanError at the first that is none."""
    return tuple(Action.parse(word) for word in text.split())
