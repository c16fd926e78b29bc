"""Measured timelines of both schedules, one JSON line per iteration and rank.

``--dip-trace-dir DIR`` switches it on.  A line holds the iteration, the rank, the start and end of
the schedule, and a list of spans ``[action, start, end, is wait]``; times are microseconds of the
host's monotonic clock, and ``is_device`` says whether a device measured them.  The plan owner's
line says where its plan came from.  The plan of the iteration lies beside them.  After the first 20
iterations only every ``--dip-trace-interval``-th is written in full; records of all steps are a
line each.  Every line names the start of the run that it belongs to.
"""

import functools
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules

from megatron_dip.costs import ProblemBuilder
from megatron_dip.costs.profile import profile_without_times
from megatron_dip.integration.feedback import MeasuredStep
from megatron_dip.integration.run_arguments import run_arguments
from megatron_dip.plan import Action, ActionType
from megatron_dip.report.steps import StepRecord
from megatron_dip.report.trace_files import TraceFiles
from megatron_dip.runtime import Recorder

if TYPE_CHECKING:
    from megatron_dip.integration.pipeline import DipPipeline

__all__ = [
    "agree_on_run",
    "iteration_number",
    "last_iteration",
    "measure_schedule",
    "trace_step",
    "wants_records",
    "write_machine",
    "write_record",
]

_FIRST_TIMELINES = 20


def wants_records() -> bool:
    """Whether this run has ``--dip-trace-dir``."""
    return bool(getattr(run_arguments(), "dip_trace_dir", None))


def agree_on_run() -> None:
    """Give this start of the run a name, the same on all ranks; a collective call of the world."""
    args = run_arguments()
    if getattr(args, "dip_run", None) is None:
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        shared: list[Any] = [name]
        dist.broadcast_object_list(shared, src=0)
        args.dip_run = shared[0]


@functools.cache
def _files(folder: str) -> TraceFiles:
    args = run_arguments()
    return TraceFiles(
        Path(folder),
        args.dip_run,
        rank=dist.get_rank(),
        replica=int(mpu.get_data_parallel_rank()),
        num_kept=args.dip_trace_keep,
    )


def trace_step(pipeline: "DipPipeline", step: MeasuredStep) -> None:
    """Write what this rank did in a step that ends now, where its timeline is wanted."""
    if not wants_records() or not _wants_timeline(step.iteration):
        return
    step.recorder.finish()
    planning = {"planning": step.planning} if step.planning else {}
    line = _line("dip", step.recorder, step.start_us, step.recorder.now_us()) | planning
    plan = step.plan if pipeline.writes_records else None
    _files(run_arguments().dip_trace_dir).write_timeline(line, plan)


def write_record(record: StepRecord) -> None:
    """Append the record of a step; called by one rank of a replica."""
    if wants_records():
        _files(run_arguments().dip_trace_dir).write_record(record)


def write_machine(problems: ProblemBuilder, device: torch.device) -> None:
    """Write what the times of this run are measured on, where they are recorded; called by one
    rank of a replica."""
    if wants_records() and mpu.get_data_parallel_rank() == 0:
        profile = profile_without_times(
            problems.model,
            problems.memory.parallel,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            is_fp32=problems.memory.kernels.is_fp32,
        )
        _files(run_arguments().dip_trace_dir).write_machine(profile)


def _wants_timeline(iteration: int) -> bool:
    return iteration <= _FIRST_TIMELINES or iteration % run_arguments().dip_trace_interval == 0


def measure_schedule(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's own schedule, its forward and backward steps timed for ``--dip-trace-dir``."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("forward_only") or not _wants_timeline(iteration_number()):
            return schedule(*args, **kwargs)
        agree_on_run()
        recorder = Recorder()
        originals = (schedules.forward_step, schedules.backward_step)
        schedules.forward_step = _timed(schedules.forward_step, ActionType.FORWARD, recorder)
        schedules.backward_step = _timed(schedules.backward_step, ActionType.BACKWARD, recorder)
        start = recorder.now_us()
        try:
            return schedule(*args, **kwargs)
        finally:
            schedules.forward_step, schedules.backward_step = originals
            line = _line("stock", recorder, start, recorder.now_us())
            _files(run_arguments().dip_trace_dir).write_timeline(line)

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


def iteration_number() -> int:
    """The iteration under way, counted from 1 as Megatron's log does."""
    return int(run_arguments().curr_iteration) + 1


def last_iteration() -> int:
    """The one after which training ends."""
    return int(run_arguments().train_iters)


def _line(schedule: str, recorder: Recorder, start_us: float, end_us: float) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "iteration": iteration_number(),
        "rank": mpu.get_pipeline_model_parallel_rank(),
        "num_ranks": mpu.get_pipeline_model_parallel_world_size(),
        "start_us": start_us,
        "end_us": end_us,
        "is_device": any(span.is_device for span in recorder.spans),
        "spans": [
            [str(span.label), span.start_us, span.end_us, span.is_wait] for span in recorder.spans
        ],
    }
