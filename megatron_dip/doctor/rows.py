"""One row of what was examined."""

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

__all__ = ["Row", "State", "ok", "problem", "warning", "worst_state"]


class State(StrEnum):
    """What a row means for a run, from best to worst."""

    OK = "ok"
    WARNING = "warning"
    """It runs, slowly or less safely."""
    PROBLEM = "problem"
    """It would not start, or would stop or hang."""


class Row(NamedTuple):
    """One thing that was examined."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """What to do; empty where there is nothing to do."""


def ok(name: str, found: str) -> Row:
    """A row that needs nothing."""
    return Row(name, State.OK, found)


def warning(name: str, found: str, remedy: str) -> Row:
    """A row that should be looked at."""
    return Row(name, State.WARNING, found, remedy)


def problem(name: str, found: str, remedy: str) -> Row:
    """A row that stops a run."""
    return Row(name, State.PROBLEM, found, remedy)


def worst_state(rows: Iterable[Row]) -> State:
    """Of all rows; ok where there are none."""
    order = list(State)
    return max((row.state for row in rows), key=order.index, default=State.OK)
