"""One rank of a rehearsal: the executor and its channels over gloo, with stages that sleep.

Stands in for a device with a queue of its own: an action starts when the one before it has ended
and its inputs are there, and what the host does between two actions is hidden, as kernel launches
are on a GPU, as long as the host keeps up.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from megatron_dip.costs import Boundary
from megatron_dip.errors import DipError
from megatron_dip.partition import Stage
from megatron_dip.plan import ActionType, Work, pipeline_channels
from megatron_dip.planner import PlannedBatch
from megatron_dip.rehearsal.local_ranks import Done, Failed
from megatron_dip.rehearsal.results import RankRun, RankTask, RehearsedSpan
from megatron_dip.runtime import (
    Channels,
    Executor,
    ForwardCall,
    Recorder,
    Reduction,
    SavedForward,
    create_channel_groups,
)
from megatron_dip.workload import SubMicrobatch

__all__ = ["run_rank"]

_log = logging.getLogger(__name__)

_SHORTEST_WAIT_US = 30.0
"""A wait that took less found its message there."""
_START_DELAY_US = 20_000.0
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


def run_rank(task: RankTask, messages: Connection) -> None:
    """Run the plan and send a list of :class:`RankRun`; see ``local_ranks``."""
    _prepare_process()
    try:
        messages.send(Done(_run(task)))
    except (DipError, RuntimeError) as error:
        messages.send(Failed(str(error)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(task: RankTask) -> list[RankRun]:
    num_ranks = task.plan.problem.num_ranks
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task.store}",
        rank=task.rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=task.timeout_seconds),
    )
    pipeline = range(num_ranks)
    upstream = {module.name: module.upstream for module in task.plan.problem.modules}
    queues = task.plan.queues
    groups = create_channel_groups(
        pipeline_channels(task.plan.partition, upstream),
        [pipeline],
        task.timeout_seconds,
        num_communicators=1 if queues is None else queues.communicators,
    )
    channels = Channels(
        rank=task.rank,
        pipeline=pipeline,
        groups=groups,
        device=torch.device("cpu"),
        timeout_seconds=task.timeout_seconds,
    )
    channels.connect()
    executor = Executor(
        rank=task.rank,
        channels=channels,
        boundary=lambda module, *, outer: Boundary("packed", width=1),
        dtype=torch.float32,
    )
    runs = []
    for _ in range(task.repetitions):
        recorder = Recorder()
        clock = _DeviceClock(recorder)
        gc.collect()
        # What is there now stays: collections during the run need not look at it.
        gc.freeze()
        start_us = _common_start_us(recorder)
        clock.start(start_us)
        executor.run(PlannedBatch(task.plan), _SleepingRunner(task, clock), recorder)
        runs.append(_rank_run(recorder, start_us))
    return runs


def _common_start_us(recorder: Recorder) -> float:
    """A moment shortly after all ranks are ready; the clock is the host's."""
    dist.barrier()
    start = torch.tensor([recorder.now_us() + _START_DELAY_US], dtype=torch.float64)
    dist.broadcast(start, 0)
    return float(start)


def _rank_run(recorder: Recorder, start_us: float) -> RankRun:
    spans = tuple(
        RehearsedSpan(str(span.label), span.start_us - start_us, span.end_us - start_us, wait)
        for span in recorder.spans
        for wait in [span.is_wait]
    )
    return RankRun(max((s.end_us for s in spans if not s.is_wait), default=0.0), spans)


class _DeviceClock:
    """When the device that is stood in for would be free."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._num_spans = 0
        self._free_us = 0.0

    def start(self, start_us: float) -> None:
        self._free_us = start_us
        self._sleep_until(start_us)

    def occupy(self, duration_us: float) -> None:
        """Return when the device has worked for ``duration_us``."""
        spans = self._recorder.spans
        for span in spans[self._num_spans :]:
            if span.is_wait and span.end_us - span.start_us >= _SHORTEST_WAIT_US:
                self._free_us = max(self._free_us, span.end_us)
        self._num_spans = len(spans)
        self._free_us += duration_us
        self._sleep_until(self._free_us)

    def _sleep_until(self, deadline_us: float) -> None:
        left_us = deadline_us - self._recorder.now_us()
        if left_us > 0:
            time.sleep(left_us / 1e6)


class _SleepingRunner:
    """Stages that take the time of their actions and make tensors of the size that is sent."""

    def __init__(self, task: RankTask, clock: _DeviceClock) -> None:
        self._task = task
        self._clock = clock

    def prepare(self, work: Work, stage: Stage, sub_microbatch: SubMicrobatch) -> None:
        """There are no data."""

    def forward(self, call: ForwardCall) -> torch.Tensor:
        output = torch.empty((sum(size.tokens for size in call.sizes), 1, 1))
        self._occupy(call, ActionType.FORWARD)
        return output

    def backward(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        kind = ActionType.BACKWARD
        if not self._task.plan.graph.has_weight_grad(saved.call.stage.stage):
            kind = ActionType.INPUT_GRAD
        return self._input_grads(saved, kind)

    def input_grad(
        self, saved: SavedForward, output_grad: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        return self._input_grads(saved, ActionType.INPUT_GRAD)

    def weight_grad(self, saved: SavedForward) -> None:
        self._occupy(saved.call, ActionType.WEIGHT_GRAD)

    def release_output(self, saved: SavedForward) -> None:
        saved.output = torch.empty(0)

    def reductions(self, stage: Stage) -> Sequence[Reduction]:
        """One replica has nothing to reduce."""
        return ()

    def _input_grads(self, saved: SavedForward, kind: ActionType) -> list[torch.Tensor | None]:
        grads: list[torch.Tensor | None] = [
            torch.empty_like(tensor) if tensor.requires_grad else None
            for tensor in saved.input_tensors
        ]
        self._occupy(saved.call, kind)
        return grads

    def _occupy(self, call: ForwardCall, kind: ActionType) -> None:
        self._clock.occupy(self._task.durations_us[call.work.action(kind)])


def _prepare_process() -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        # Sleeps end when they should and not up to 50 us later, and no rank outlives its parent.
        library.prctl(_PR_SET_TIMERSLACK, 1)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _ask_for_priority()


def _ask_for_priority() -> None:
    """Have this process, and the threads that it starts, run as soon as they have something to do.

    A rank sleeps most of the time, but between two sleeps it must not queue behind programs that
    compute: they would hold the processor for milliseconds.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        _log.info("no real-time priority: other programs on this machine may disturb the rehearsal")
