"""A process per tensor-parallel rank that measures; what they agree on is the profile."""

import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_dip.costs.profile import Profile
from megatron_dip.errors import ConfigError
from megatron_dip.rehearsal.local_ranks import run_local_ranks

__all__ = ["ProfileTask", "measure_profile"]

_START_SECONDS = 180.0
"""Limit for importing Megatron and building stages."""
_SLOWEST = 4.0
"""Times the time limit after which the measuring is given up: calls are not cut short."""


class ProfileTask(NamedTuple):
    """What a rank is to measure."""

    config: Path
    device: Literal["cpu", "gpu"]
    layers: Literal["local", "transformer_engine"]
    precision: Literal["fp32", "bf16"]
    tensor_parallel: int
    sequence_parallel: bool
    num_points: int
    repetitions: int
    seconds: float
    """For all points together."""
    seed: int = 1234
    rank: int = 0
    store: Path = Path()
    """File through which the ranks find each other."""


def measure_profile(
    task: ProfileTask, on_point: Callable[[str, int], None] = lambda what, total: None
) -> Profile:
    """Measure every module of a configuration.

    Args:
        task: ``rank`` and ``store`` are filled in here.
        on_point: Called after every point with a description and the number of all points.

    Returns:
        The first rank's measurements: tensor-parallel ranks wait for each other in every layer.

    Raises:
        ConfigError: An option is out of range.
        ExecutionError: A rank failed; its reason is in the message.
    """
    for option, value, most in (
        ("--repetitions", task.repetitions, 1e6),
        ("--time-limit", task.seconds, 1e7),
        ("--tensor-parallel", task.tensor_parallel, 1024),
    ):
        if not 0 < value <= most:
            raise ConfigError(f"{option} {value:g}: expected a number above 0, up to {most:g}")
    if task.sequence_parallel and task.tensor_parallel == 1:
        raise ConfigError("--sequence-parallel: expected --tensor-parallel above 1")

    def on_progress(rank: int, value: tuple[str, int]) -> None:
        if rank == 0:
            on_point(*value)

    with tempfile.TemporaryDirectory(prefix="megatron-dip-") as folder:
        profiles: list[Profile] = run_local_ranks(
            "the measurement",
            _measure_rank,
            [
                task._replace(rank=rank, store=Path(folder) / "store")
                for rank in range(task.tensor_parallel)
            ],
            limit_seconds=_START_SECONDS + _SLOWEST * task.seconds,
            remedy="use fewer --points or a longer --time-limit",
            on_progress=on_progress,
        )
    return profiles[0]


def _measure_rank(task: ProfileTask, messages: Connection) -> None:
    # Here and not above: torch and Megatron are loaded where ranks run.
    from megatron_dip.integration.profiling.rank import measure_rank

    measure_rank(task, messages)
