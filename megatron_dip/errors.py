"""Every exception that this package raises on purpose.

Each message says what was given, what was expected and what to do.  Errors about user input
are also ``ValueError``, so that callers who know nothing of this package can catch them.
"""

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
]


class DipError(Exception):
    """Base of every error of this package."""


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
