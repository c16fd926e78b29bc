"""Measured timelines of both schedules, one JSON line per iteration and rank.

``--dip-trace-dir DIR`` switches it on.  A line holds the iteration, the rank, the start and end of
the schedule, and a list of spans ``[action, start, end, is wait]``; times are microseconds of the
host's monotonic clock.  The plan owner's line says where its plan came from.  The plan of the
iteration lies beside them.  After the first 20 iterations only every ``--dip-trace-interval``-th is
written in full; records of all steps are a line each.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules
from megatron.training import get_args

from megatron_dip.integration.feedback import MeasuredStep
from megatron_dip.plan import Action, ActionType, save_plan
from megatron_dip.report.steps import StepRecord, record_path
from megatron_dip.runtime import Recorder

if TYPE_CHECKING:
    from megatron_dip.integration.pipeline import DipPipeline

__all__ = [
    "iteration_number",
    "measure_schedule",
    "trace_folder",
    "trace_step",
    "write_record",
]

_FIRST_TIMELINES = 20


def trace_step(pipeline: "DipPipeline", step: MeasuredStep) -> None:
    """Write what this rank did in a step that ends now, where its timeline is wanted."""
    directory = trace_folder()
    if directory is None or not _wants_timeline(step.iteration):
        return
    step.recorder.finish()
    planning = {"planning": step.planning} if step.planning else {}
    _write(directory, "dip", step.recorder, step.start_us, step.recorder.now_us(), **planning)
    if pipeline.writes_records:
        save_plan(step.plan, directory / f"plan-replica{_replica()}-{step.iteration:06d}.json")


def write_record(record: StepRecord) -> None:
    """Append the record of a step; called by one rank of a replica."""
    directory = trace_folder()
    if directory is not None:
        with open(record_path(directory, _replica()), "a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")


def _wants_timeline(iteration: int) -> bool:
    return iteration <= _FIRST_TIMELINES or iteration % get_args().dip_trace_interval == 0


def measure_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's own schedule, its forward and backward steps timed where a trace is asked for."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        directory = trace_folder()
        unwanted = kwargs.get("forward_only") or not _wants_timeline(iteration_number())
        if directory is None or unwanted:
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


def trace_folder() -> Path | None:
    """Where traces and records go; None where none are wanted."""
    path = getattr(get_args(), "dip_trace_dir", None)
    if not path:
        return None
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def iteration_number() -> int:
    """The iteration under way, counted from 1 as Megatron's log does."""
    return int(get_args().curr_iteration) + 1


def _replica() -> int:
    return int(mpu.get_data_parallel_rank())


def _write(
    directory: Path, schedule: str, recorder: Recorder, start_us: float, end_us: float, **more: Any
) -> None:
    line = more | {
        "schedule": schedule,
        "iteration": iteration_number(),
        "rank": mpu.get_pipeline_model_parallel_rank(),
        "start_us": start_us,
        "end_us": end_us,
        "spans": [
            [str(span.label), span.start_us, span.end_us, span.is_wait] for span in recorder.spans
        ],
    }
    with open(directory / f"rank{dist.get_rank():05d}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
