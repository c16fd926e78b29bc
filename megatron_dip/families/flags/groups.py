"""What becomes of a flag of Megatron when a run of the models of ``--dip-config`` states it.

Flags are named by their destinations in ``args``.  A group holds flags that have one verdict for
one reason; ``table`` holds them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megatron_dip.integration.rules import LEAVE_OUT

__all__ = ["LEAVE_OUT", "FlagGroup", "Verdict", "names", "refused"]


class Verdict(StrEnum):
    """What is done with a flag that a run states."""

    MEGATRON = "Megatron's"
    """Honoured by Megatron's own loop, optimizer, checkpoints or process groups."""
    MODULES = "all modules"
    """Honoured by the configurations of all modules."""
    EXPERTS = "experts"
    """Honoured by the modules that have experts; refused where the model has none."""
    FILE = "the file"
    """Stated by the file of ``--dip-config``, with which the flag must agree."""
    DATA = "data"
    """Honoured by the loader of the data sets here, or refused by its own rules."""
    REFUSED = "refused"
    """Refused under either schedule."""


@dataclass(frozen=True, kw_only=True)
class FlagGroup:
    """Flags with one verdict for one reason.

    ``reason`` completes "... does not work with the models of --dip-config: ", or says what an
    honoured flag does.  ``harmless`` are values, by destination, that ask for nothing: they are
    accepted although the flag is refused.
    """

    title: str
    verdict: Verdict
    reason: str
    destinations: tuple[str, ...]
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def names(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


def refused(title: str, reason: str, destinations: str, **harmless: tuple[Any, ...]) -> FlagGroup:
    """A group of refused flags; the names of ``destinations`` are words of one text."""
    return FlagGroup(
        title=title,
        verdict=Verdict.REFUSED,
        reason=reason,
        destinations=names(destinations),
        harmless=harmless,
    )
