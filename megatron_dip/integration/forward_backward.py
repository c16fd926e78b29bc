"""Megatron's forward-backward function, run under a plan.

Takes and returns what ``megatron.core.pipeline_parallel.schedules`` does: pulls the microbatches
of the step, has a plan made for them, runs it, and finalizes gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_dip.integration.ahead import Ahead, own_iterator, pull
from megatron_dip.integration.feedback import MeasuredStep
from megatron_dip.integration.late_checks import checked_at_the_end
from megatron_dip.integration.parameter_gathers import finish_gathers, start_gathers
from megatron_dip.integration.part_check import check_parts
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.run_arguments import note_iteration
from megatron_dip.integration.runner import ContextRank, MegatronRunner
from megatron_dip.integration.stages import place_of
from megatron_dip.integration.trace import iteration_number, trace_step, wants_records
from megatron_dip.integration.wrappers import (
    boundaries_in_16_bits,
    reduces_early,
    without_gradient_sync,
)
from megatron_dip.plan import Plan
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime import Recorder, create_recorder

__all__ = ["forward_backward_dip"]


def forward_backward_dip(
    *,
    forward_step_func: Any,
    data_iterator: Any,
    model: Sequence[torch.nn.Module],
    num_microbatches: int,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    force_all_reduce: bool | None = False,
    **_: Any,
) -> list[Any]:
    """One step of training or evaluation; what Megatron's schedules ask for and do not use here
    (sequence length, micro-batch size, communicators) is in the plan.

    Returns:
        On the last pipeline rank the reports of the loss function, one per microbatch; else [].

    Raises:
        UnsupportedError: The model was not built in stages.
        DataError: A microbatch cannot be used.
        ExecutionError: An action of the plan failed.
    """
    pipeline = place_of(model[0]).pipeline
    recorder = create_recorder(pipeline.device)
    start_us = recorder.now_us()
    if not forward_only:
        note_iteration()
        pipeline.feedback.begin_step()
    config = get_model_config(model[0])
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    start_gathers(model)
    data_iterator = own_iterator(data_iterator)
    ahead = Ahead(pipeline, data_iterator, num_microbatches, trains=not forward_only)
    batches, sizes = pull(pipeline, data_iterator, num_microbatches)
    ahead.start()
    recorder.record("data", start_us)
    data_end_us = recorder.now_us()
    if not forward_only:
        pipeline.plans.note_step()
    planned = pipeline.plans.plan(sizes)
    recorder.record("plan", data_end_us, is_wait=not pipeline.is_plan_owner)
    plan_end_us = recorder.now_us()
    runner_of = partial(
        MegatronRunner,
        pipeline,
        {place_of(chunk).stage.stage: chunk for chunk in model},
        forward_step_func,
        batches,
        config=config,
        context=ContextRank(mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()),
        reduces_early=reduces_early(model) and not (forward_only or force_all_reduce),
        first_microbatch=schedules.check_first_val_step(first_val_step, forward_only, True),
        collect_non_loss_data=collect_non_loss_data,
        counts_stored_bytes=wants_records() and not forward_only,
    )
    with checked_at_the_end():
        runner = _run(pipeline, model, planned, runner_of, recorder, forward_only=forward_only)
        ahead.go_on(recorder)
        if not forward_only:
            _finalize(model, config, runner, bool(force_all_reduce))
    if config.timers is not None:
        config.timers("forward-backward").stop()
    if not forward_only:
        times = (start_us, data_end_us, plan_end_us)
        stored_bytes = runner.stored.peak if runner.stored else 0
        _follow(pipeline, planned.plan, recorder, times, stored_bytes, ahead)
    return runner.reports.in_order()


def _run(
    pipeline: DipPipeline,
    model: Sequence[torch.nn.Module],
    planned: PlannedBatch,
    runner_of: Callable[[PlannedBatch], MegatronRunner],
    recorder: Recorder,
    *,
    forward_only: bool,
) -> MegatronRunner:
    """Run the plan of a step."""
    runner = runner_of(planned)
    with without_gradient_sync(model), boundaries_in_16_bits(model, planned.plan):
        if pipeline.checks_parts and not forward_only:
            check_parts(pipeline, model, planned, runner_of)
        pipeline.executor.run(planned, runner, recorder, forward_only=forward_only)
    for chunk in model:
        finish_gathers(chunk)
    runner.gradient_checks.finish()
    return runner


def _follow(
    pipeline: DipPipeline,
    plan: Plan,
    recorder: Recorder,
    times_us: tuple[float, float, float],
    stored_bytes: int,
    ahead: Ahead,
) -> None:
    """Write and use what a training step has measured; its begin, and when data and plan came."""
    start_us, data_end_us, plan_end_us = times_us
    step = MeasuredStep(
        iteration=iteration_number(),
        plan=plan,
        recorder=recorder,
        start_us=start_us,
        data_end_us=data_end_us,
        plan_end_us=plan_end_us,
        stored_bytes=stored_bytes,
        planning=pipeline.plans.summary(),
        assignment=ahead.assignment_of(iteration_number()),
    )
    trace_step(pipeline, step)
    pipeline.follow(step)


def _finalize(
    model: Sequence[torch.nn.Module],
    config: TransformerConfig,
    runner: MegatronRunner,
    force_all_reduce: bool,
) -> None:
    if config.finalize_model_grads_func is None:
        return
    config.finalize_model_grads_func(
        list(model),
        runner.num_tokens if config.calculate_per_token_loss else None,
        pg_collection=get_attr_wrapped_model(model[0], "pg_collection"),
        force_all_reduce=force_all_reduce,
    )
