"""What a run has recorded: steps with their plans, batches as problems, times of its layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dip.costs.profile import Profile, load_profile
from megatron_dip.errors import DataError
from megatron_dip.plan import Plan
from megatron_dip.report.fit import FittedModule, fit_times, restated
from megatron_dip.report.trace_files import machine_path
from megatron_dip.report.traces import IterationTrace, plan_of_trace, read_traces
from megatron_dip.workload import Problem

__all__ = ["fitted_profile", "recorded_problems", "recorded_steps"]

_WARM_UP_STEPS = 2
"""The first steps of a run compile and allocate."""


def recorded_steps(folder: str | Path, replica: int = 0) -> list[tuple[IterationTrace, Plan]]:
    """The steps of the last run in a trace folder, each with its plan, without the first ones.

    Raises:
        DataError: There are none.
    """
    traces = [trace for trace in read_traces(folder, replica) if trace.schedule == "dip"]
    last = [trace for trace in traces if trace.run == traces[-1].run]
    steps = [(trace, plan_of_trace(folder, trace)) for trace in last[_WARM_UP_STEPS:]]
    if not steps:
        raise DataError(
            f"{folder}: {len(last)} timelines of --dip-schedule (expected more than "
            f"{_WARM_UP_STEPS}: the first steps warm up; train some steps with --dip-trace-dir)"
        )
    return steps


def recorded_problems(
    steps: Sequence[tuple[IterationTrace, Plan]], most: int
) -> tuple[list[Problem], Mapping[str, FittedModule]]:
    """Batches of a run at the times that it took for them, whatever its cut; and these times.

    Args:
        steps: As :func:`recorded_steps` reads them.
        most: Batches that are given back; where there are more, from all over the run.

    Raises:
        DataError: An earlier version recorded them.
    """
    fitted = fit_times(steps)
    count = min(most, len(steps))
    chosen = [steps[number * len(steps) // count][1] for number in range(count)]
    return [restated(plan.problem, fitted) for plan in chosen], fitted


def fitted_profile(
    folder: str | Path, replica: int = 0
) -> tuple[Profile, Mapping[str, FittedModule]]:
    """The times of a recorded run's layers as a profile, and how well they fit.

    Raises:
        DataError: Nothing was recorded, or by an earlier version.
        ConfigError: What the run wrote of its machine cannot be read.
    """
    fitted = fit_times(recorded_steps(folder, replica))
    profile = load_profile(machine_path(folder))
    modules = {
        name: module.model_copy(update={"times": fitted[name].times})
        for name, module in profile.modules.items()
        if name in fitted
    }
    return profile.model_copy(update={"modules": modules}), fitted
