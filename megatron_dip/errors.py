"""Every exception that this package raises on purpose, and how values are shown in their messages.

Each message says what was given, what was expected and what to do.  Errors about user input
are also ``ValueError``, so that callers who know nothing of this package can catch them.

A message has a length limit, because what it shows comes from files: values enter it through
:func:`shown`, and what is left too long is cut where the message is read.
"""

import reprlib

__all__ = [
    "ChannelError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DipError",
    "ExecutionError",
    "InfeasibleError",
    "PartitionError",
    "PlanDeadlockError",
    "PlanDigestError",
    "PlanError",
    "PlanMemoryError",
    "PlanningError",
    "ProblemError",
    "UnsupportedError",
    "one_line",
    "shown",
]

MAX_MESSAGE_CHARACTERS = 2000
_MAX_VALUE_CHARACTERS = 80
_NUM_SHOWN_ENTRIES = 6


def shown(value: object, limit: int = _MAX_VALUE_CHARACTERS) -> str:
    """``value`` as a message shows it: in quotes where it is a text, nothing unprintable, short.

    Args:
        limit: About the most characters; what is longer is cut and its length said.
    """
    if isinstance(value, str):
        if len(value) <= limit:
            return repr(value)
        return f"{value[:limit]!r}... ({len(value):,} characters)"
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = _NUM_SHOWN_ENTRIES
    short.maxstring = short.maxlong = short.maxother = limit
    try:
        text = short.repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits.
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else "a value"
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(text: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """``text`` on a line of its own: white space joined, control characters written out, cut in the
    middle where it is longer than ``limit``, because the remedy stands at the end."""
    flat = " ".join(_cut(text, 2 * limit).split())
    if not flat.isprintable():
        flat = "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
    return _cut(flat, limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 4
    left_out = len(text) - limit
    return f"{text[: limit - tail]} ... ({left_out:,} characters) ... {text[-tail:]}"


class DipError(Exception):
    """Base of every error of this package."""

    def __str__(self) -> str:
        """The message; of an error about input, not longer than ``MAX_MESSAGE_CHARACTERS``."""
        text = super().__str__()
        return _cut(text, MAX_MESSAGE_CHARACTERS) if isinstance(self, ValueError) else text


class ConfigError(DipError, ValueError):
    """A configuration file or command line that cannot be used."""


class DataError(DipError, ValueError):
    """A training sample that cannot be used; names the sample."""


class CheckpointError(DipError, ValueError):
    """A file of adapters that cannot be used with this model; names what does not fit."""


class ProblemError(DipError, ValueError):
    """A batch problem that is incomplete or contradicts itself; names the field."""


class PartitionError(DipError, ValueError):
    """A partition that does not cover its modules; names the stage or module."""


class PlanError(DipError, ValueError):
    """A plan that is not a correct schedule of its problem; names the action."""


class PlanDeadlockError(PlanError):
    """Some actions of a plan can never run; lists the blocked head of every rank."""


class PlanDigestError(PlanError):
    """A plan that was made for another problem or partition, or that differs between ranks."""


class PlanMemoryError(PlanError):
    """A plan that needs more memory on a rank than its problem allows."""


class InfeasibleError(DipError):
    """No schedule satisfies the limits of the problem; names the rank and the limit."""


class PlanningError(DipError):
    """The plan owner could not plan a batch; raised on all ranks of its pipeline."""


class ChannelError(DipError):
    """A transfer between two ranks failed or did not finish within its time limit."""


class ExecutionError(DipError):
    """An action of a plan failed on a rank; shows the action inside its rank's schedule."""


class UnsupportedError(DipError, ValueError):
    """A Megatron version, flag or machine that this package does not work with."""
