"""A rehearsal: a process per rank on this machine, each wait with a limit."""

import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_dip.errors import ConfigError, PlanError
from megatron_dip.plan import Plan
from megatron_dip.plan.validation import validate_plan
from megatron_dip.rehearsal.local_ranks import run_local_ranks
from megatron_dip.rehearsal.results import RankTask, Rehearsal
from megatron_dip.rehearsal.scaling import scale_plan
from megatron_dip.simulator import simulate

__all__ = ["Rehearsal", "rehearse"]

_START_SECONDS = 120.0
"""Limit for processes to start and connect."""
_MOST_REPETITIONS = 10_000
_LONGEST_US = 24 * 3600 * 1e6
_SLOWEST = 20.0
"""Times the predicted duration after which a repetition is given up."""


def rehearse(
    plan: Plan, *, time_scale: float = 1.0, transfer_scale: float = 1.0, repetitions: int = 3
) -> Rehearsal:
    """Run ``plan`` on a process per rank; see the package's docstring.

    Raises:
        PlanError: The plan is not a correct schedule of its problem, or offloads activations, which
            stages that sleep have none of.
        ConfigError: A scale or the number of repetitions is not above zero.
        ExecutionError: A rank failed, died or did not end within its time limit.
    """
    if not 1 <= repetitions <= _MOST_REPETITIONS:
        raise ConfigError(
            f"--repetitions {repetitions}: expected at least 1, at most {_MOST_REPETITIONS:,}"
        )
    validate_plan(plan)
    if plan.offload:
        raise PlanError(
            f"the rehearsal has no activations that could be copied to the host, and the plan "
            f"offloads those of {len(plan.offload)} works (plan without host_link to rehearse, or "
            f"use `megatron-dip simulate`)"
        )
    scaled = scale_plan(plan, time_scale, transfer_scale)
    predicted = simulate(scaled)
    if predicted.makespan_us * repetitions > _LONGEST_US:
        raise ConfigError(
            f"{repetitions} repetitions of {predicted.makespan_us / 1e6:.3g} s each take more than "
            f"a day (use a smaller --time-scale or fewer --repetitions)"
        )
    timeout_seconds = _START_SECONDS + _SLOWEST * predicted.makespan_us / 1e6
    with tempfile.TemporaryDirectory(prefix="megatron-dip-") as folder:
        tasks = [
            RankTask(
                rank=rank,
                plan=scaled,
                durations_us={t.action: t.end_us - t.start_us for t in line},
                repetitions=repetitions,
                timeout_seconds=timeout_seconds,
                store=Path(folder) / "store",
            )
            for rank, line in enumerate(predicted.timelines)
        ]
        runs = run_local_ranks(
            "the rehearsal",
            _run_rank,
            tasks,
            limit_seconds=timeout_seconds * repetitions,
            remedy="the machine may be overloaded: use a larger --time-scale",
            preload=["megatron_dip.rehearsal.rank"],
        )
    return Rehearsal(
        plan=scaled,
        predicted_us=predicted.makespan_us,
        predicted_rank_us=tuple(line[-1].end_us if line else 0.0 for line in predicted.timelines),
        repetitions=tuple(zip(*runs, strict=True)),
    )


def _run_rank(task: RankTask, messages: Connection) -> None:
    # Here and not above: torch is loaded where ranks run, not where they are started from.
    from megatron_dip.rehearsal.rank import run_rank

    run_rank(task, messages)
