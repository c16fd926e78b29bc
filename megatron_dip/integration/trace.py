"""Measured timelines of both schedules, one JSON line per iteration and rank.

``--dip-trace-dir DIR`` switches it on.  A line holds the iteration, the rank, the start and end of
the schedule, and a list of spans ``[action, start, end, is wait]``; times are microseconds of the
host's monotonic clock.  The plan owner's line says where its plan came from.  The plan of every
iteration lies beside them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules
from megatron.training import get_args

from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.plan import Action, ActionType, Plan, save_plan
from megatron_dip.runtime import Recorder

__all__ = ["measure_schedule", "trace_plan"]


def trace_plan(pipeline: DipPipeline, plan: Plan, recorder: Recorder, start_us: float) -> None:
    """Write what this rank did in the iteration that started at ``start_us`` and ends now."""
    directory = _directory()
    if directory is None:
        return
    obtained = pipeline.plans.last_obtained
    planning = {} if obtained is None else {"planning": obtained.summary()}
    _write(directory, "dip", recorder, start_us, recorder.now_us(), **planning)
    if pipeline.is_plan_owner:
        save_plan(plan, directory / f"plan-replica{_replica()}-{_iteration():06d}.json")


def measure_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's own schedule, its forward and backward steps timed where a trace is asked for."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        directory = _directory()
        if directory is None or kwargs.get("forward_only"):
            return schedule(*args, **kwargs)
        recorder = Recorder()
        originals = (schedules.forward_step, schedules.backward_step)
        schedules.forward_step = _timed(schedules.forward_step, ActionType.FORWARD, recorder)
        schedules.backward_step = _timed(schedules.backward_step, ActionType.BACKWARD, recorder)
        start = recorder.now_us()
        try:
            return schedule(*args, **kwargs)
        finally:
            schedules.forward_step, schedules.backward_step = originals
            _write(directory, "stock", recorder, start, recorder.now_us())

    return measured


def _timed(step: Callable[..., Any], kind: ActionType, recorder: Recorder) -> Callable[..., Any]:
    """``step`` recorded as actions of a stage that is numbered like its rank."""
    count = 0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        start = recorder.now_us()
        result = step(*args, **kwargs)
        action = Action(mpu.get_pipeline_model_parallel_rank(), kind, count)
        recorder.record(action, start)
        count += 1
        return result

    return timed


def _directory() -> Path | None:
    path = getattr(get_args(), "dip_trace_dir", None)
    if not path:
        return None
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _iteration() -> int:
    """The iteration under way, counted from 1 as Megatron's log does."""
    return int(get_args().curr_iteration) + 1


def _replica() -> int:
    return int(mpu.get_data_parallel_rank())


def _write(
    directory: Path, schedule: str, recorder: Recorder, start_us: float, end_us: float, **more: Any
) -> None:
    line = more | {
        "schedule": schedule,
        "iteration": _iteration(),
        "rank": mpu.get_pipeline_model_parallel_rank(),
        "start_us": start_us,
        "end_us": end_us,
        "spans": [
            [str(span.label), span.start_us, span.end_us, span.is_wait] for span in recorder.spans
        ],
    }
    with open(directory / f"rank{dist.get_rank():05d}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
