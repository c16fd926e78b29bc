"""Measured steps: back into the costs, and into Megatron's log, TensorBoard, W&B and records.

A step is measured when the next one begins, its numbers are gathered while that one runs, and used
when it ends: nothing of it makes training wait.  Every rank gets the same numbers, so that all
ranks have the same costs; which plan is run, the owner still decides.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.distributed as dist
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import print_rank_last

from megatron_dip.costs.work import static_bytes
from megatron_dip.integration.run_arguments import run_arguments
from megatron_dip.partition import Partition
from megatron_dip.plan import Action, Plan
from megatron_dip.report.steps import AssignmentRecord, RankRecord, StepRecord
from megatron_dip.runtime import Recorder
from megatron_dip.runtime.exchange import RankStep, StepExchange
from megatron_dip.simulator.measured import (
    Corrections,
    CostFeedback,
    action_durations_us,
    measure_actions,
)

__all__ = ["MeasuredStep", "StepFeedback", "log_step"]

_STEPS_REMEMBERED = 8


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """One training step on this rank; times of the host's clock."""

    iteration: int
    plan: Plan
    recorder: Recorder
    start_us: float
    data_end_us: float
    plan_end_us: float
    stored_bytes: int
    """Most bytes of activations held at a time; 0 where they were not counted."""
    planning: Mapping[str, Any]
    """Where the plan came from, for records."""
    assignment: AssignmentRecord | None
    """What moved before the batch was planned."""


class StepFeedback:
    """What the steps of one pipeline measure, and what follows from it.

    Args:
        overheads_us: Of calling a layer, per module, as the costs state it.
        group: A CPU group of the pipeline's ranks with nothing else on it.
        rank: Pipeline rank.
    """

    def __init__(
        self,
        partition: Partition,
        overheads_us: Mapping[str, float],
        group: dist.ProcessGroup,
        rank: int,
    ) -> None:
        self._costs = CostFeedback(partition, overheads_us)
        self._exchange = StepExchange(group, len(partition.stages))
        self._rank = rank
        self._last: MeasuredStep | None = None
        self._posted: MeasuredStep | None = None
        self._rest_us: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def begin_step(self) -> None:
        """A training step begins: the one before it is over, its numbers can go."""
        step, self._last = self._last, None
        if step is None:
            return
        now_us = step.recorder.now_us()
        step.recorder.finish()
        measured = measure_actions(step.plan, action_durations_us(step.recorder.spans))
        computed = [
            span
            for span in step.recorder.spans
            if isinstance(span.label, Action) and span.label.type.is_compute and not span.is_wait
        ]
        own = RankStep(
            rank=self._rank,
            makespan_us=max((s.end_us for s in computed), default=step.plan_end_us)
            - step.plan_end_us,
            busy_us=sum(s.end_us - s.start_us for s in computed),
            data_us=step.data_end_us - step.start_us,
            plan_us=step.plan_end_us - step.data_end_us,
            step_us=now_us - step.start_us,
            action_error=measured.error,
            stored_bytes=step.stored_bytes,
        )
        self._exchange.post(own, measured.sums)
        self._posted = step

    def end_step(self, step: MeasuredStep) -> tuple[StepRecord | None, Corrections | None]:
        """A training step ends.

        Returns:
            The record of the step before it, and corrections of costs where they have changed.
        """
        self._last = step
        return self._take()

    def last_step(self) -> StepRecord | None:
        """The record of the step that has just ended, where no other follows; waits for it."""
        self.begin_step()
        return self._take()[0]

    def _take(self) -> tuple[StepRecord | None, Corrections | None]:
        gathered = self._exchange.take()
        if gathered is None or self._posted is None:
            return None, None
        steps, sums = gathered
        record = self._record(self._posted, steps)
        changed = self._costs.update(sums)
        return record, self._costs.corrections if changed else None

    def _record(self, step: MeasuredStep, steps: list[RankStep]) -> StepRecord:
        plan = step.plan
        problem = plan.problem
        by_rank = {int(one.rank): one for one in steps}
        makespan_us = max(one.makespan_us for one in steps)
        step_us = max(one.step_us for one in steps)
        predicted_us = plan.estimate.makespan_us if plan.estimate else 0.0
        predicted_bytes = plan.estimate.peak_bytes if plan.estimate else (0,) * len(by_rank)
        rest_us = median(self._rest_us) if self._rest_us else 0.0
        self._rest_us.append(step_us - makespan_us)
        return StepRecord(
            iteration=step.iteration,
            predicted_us=predicted_us,
            measured_us=makespan_us,
            predicted_step_us=predicted_us + rest_us,
            step_us=step_us,
            action_error=median(one.action_error for one in steps),
            tokens={
                module.name: sum(
                    item.tokens
                    for number in range(problem.num_microbatches)
                    for item in problem.items(module.name, number)
                )
                for module in problem.modules
            },
            num_microbatches=problem.num_microbatches,
            planning=dict(step.planning),
            assignment=step.assignment,
            ranks=tuple(
                RankRecord(
                    busy_us=one.busy_us,
                    data_us=one.data_us,
                    plan_us=one.plan_us,
                    static_bytes=static_bytes(problem, plan.partition, rank),
                    predicted_bytes=predicted_bytes[rank]
                    - static_bytes(problem, plan.partition, rank),
                    stored_bytes=int(one.stored_bytes),
                )
                for rank, one in sorted(by_rank.items())
            ),
        )


def log_step(record: StepRecord) -> None:
    """Say it where Megatron does: in the log at its interval, in TensorBoard and W&B."""
    args = run_arguments()
    if record.iteration % args.log_interval == 0:
        print_rank_last(f" {record.summary()}")
    numbers = record.numbers()
    writer = get_tensorboard_writer()
    if writer is not None and record.iteration % args.tensorboard_log_interval == 0:
        for name, value in numbers.items():
            writer.add_scalar(f"dip/{name}", value, record.iteration)
    wandb = get_wandb_writer()
    if wandb is not None and record.iteration % args.tensorboard_log_interval == 0:
        wandb.log({f"dip/{name}": value for name, value in numbers.items()}, record.iteration)
