"""Megatron's forward-backward function, run under a plan.

Takes and returns what ``megatron.core.pipeline_parallel.schedules`` does: pulls the microbatches
of the step, has a plan made for them, runs it, and finalizes gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_dip.costs import BatchSizes, ItemSizes
from megatron_dip.errors import DataError, UnsupportedError
from megatron_dip.families.accounting import note_microbatch
from megatron_dip.families.packed.batches import Microbatch
from megatron_dip.integration.feedback import MeasuredStep
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.runner import MegatronRunner
from megatron_dip.integration.trace import iteration_number, trace_step, wants_records
from megatron_dip.plan import Plan
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime import Recorder, create_recorder
from megatron_dip.runtime.look_ahead import LookAhead, SizedBatch

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
        UnsupportedError: The model is not made of chunks of this package.
        DataError: The iterator yields something else than microbatches.
        ExecutionError: An action of the plan failed.
    """
    pipeline = _pipeline_of(model)
    recorder = create_recorder(pipeline.device)
    start_us = recorder.now_us()
    if not forward_only:
        pipeline.feedback.begin_step()
    config = get_model_config(model[0])
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    ahead = _Ahead(pipeline, data_iterator, num_microbatches)
    microbatches, sizes = _pull(data_iterator, num_microbatches)
    if not forward_only:
        for microbatch in microbatches:
            note_microbatch(microbatch)
    ahead.start()
    recorder.record("data", start_us)
    data_end_us = recorder.now_us()
    if not forward_only:
        pipeline.plans.note_step()
    planned = pipeline.plans.plan(sizes)
    recorder.record("plan", data_end_us, is_wait=not pipeline.is_plan_owner)
    plan_end_us = recorder.now_us()
    runner = _runner(
        model,
        forward_step_func,
        microbatches,
        planned,
        forward_only=forward_only,
        first_microbatch=schedules.check_first_val_step(first_val_step, forward_only, True),
        collect_non_loss_data=collect_non_loss_data,
    )
    with _without_gradient_sync(model), _boundaries_in_16_bits(model, planned.plan):
        pipeline.executor.run(planned, runner, recorder, forward_only=forward_only)
    ahead.go_on(recorder)
    if not forward_only:
        _finalize(model, config, runner, bool(force_all_reduce))
    if config.timers is not None:
        config.timers("forward-backward").stop()
    if not forward_only:
        times = (start_us, data_end_us, plan_end_us)
        _follow(pipeline, planned.plan, recorder, times, runner.stored.peak if runner.stored else 0)
    return runner.reports.in_order()


def _follow(
    pipeline: DipPipeline,
    plan: Plan,
    recorder: Recorder,
    times_us: tuple[float, float, float],
    stored_bytes: int,
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
    )
    trace_step(pipeline, step)
    pipeline.follow(step)


def _runner(
    model: Sequence[torch.nn.Module],
    forward_step: Any,
    microbatches: Sequence[Microbatch],
    planned: PlannedBatch,
    *,
    forward_only: bool,
    first_microbatch: bool,
    collect_non_loss_data: bool,
) -> MegatronRunner:
    return MegatronRunner(
        chunks={get_attr_wrapped_model(chunk, "stage").stage: chunk for chunk in model},
        config=get_model_config(model[0]),
        forward_step=forward_step,
        microbatches=microbatches,
        planned=planned,
        context_parallel_size=mpu.get_context_parallel_world_size(),
        reduces_early=_reduces_early(model) and not forward_only,
        first_microbatch=first_microbatch,
        collect_non_loss_data=collect_non_loss_data,
        counts_stored_bytes=wants_records() and not forward_only,
    )


class _Ahead:
    """The batches after this one, on their way from the data to their plans."""

    def __init__(self, pipeline: DipPipeline, data_iterator: Any, num_microbatches: int) -> None:
        self._pipeline = pipeline
        self._num_microbatches = num_microbatches
        self._source: LookAhead | None = None
        # Beneath Megatron's rerun iterator; a script's own iterator has none, and no look-ahead.
        if hasattr(data_iterator, "iterable"):
            if not isinstance(data_iterator.iterable, LookAhead):
                data_iterator.iterable = LookAhead(data_iterator.iterable, _item_sizes)
            self._source = data_iterator.iterable

    def start(self) -> None:
        """Read ahead in the first step, which waits for its own plan: others are made meanwhile."""
        if self._source is not None and not self._source.num_held:
            self._read()

    def go_on(self, recorder: Recorder) -> None:
        """Pass on the next plan, if there is one, read on, and request the plans that follow.

        After the last action, because what a GPU still has to do of this step hides it.
        """
        start_us = recorder.now_us()
        source, pipeline = self._source, self._pipeline
        planned = pipeline.plans.offer(source.coming(self._num_microbatches) if source else ())
        if planned is not None:
            pipeline.executor.prepare(planned)
        self._read()
        recorder.record("look ahead", start_us)

    def _read(self) -> None:
        if self._source is not None:
            self._source.hold(self._num_microbatches * self._pipeline.config.planning.look_ahead)
            self._pipeline.plans.request(self._source.coming(self._num_microbatches))


def _pipeline_of(model: Sequence[torch.nn.Module]) -> DipPipeline:
    try:
        pipeline = get_attr_wrapped_model(model[0], "pipeline")
    except RuntimeError:
        raise UnsupportedError(
            "--dip-schedule was given but the model is not made of stages (have the script's "
            "model_provider call megatron_dip.families.provider.build_model)"
        ) from None
    assert isinstance(pipeline, DipPipeline)
    return pipeline


def _pull(
    data_iterator: Iterator[Any], num_microbatches: int
) -> tuple[list[Microbatch], BatchSizes]:
    """The microbatches of the step, with the sizes of their items."""
    if data_iterator is None:
        raise DataError(
            "this rank has no data (set is_distributed = True on the script's dataset provider: "
            "under --dip-schedule every rank reads the batch's metadata)"
        )
    pulled = [next(data_iterator) for _ in range(num_microbatches)]
    sized = [
        one if isinstance(one, SizedBatch) else SizedBatch(one, _item_sizes(one)) for one in pulled
    ]
    return [one.batch for one in sized], tuple(one.sizes for one in sized)


def _item_sizes(microbatch: Any) -> ItemSizes:
    if not isinstance(microbatch, Microbatch):
        raise DataError(
            f"the data iterator yielded {type(microbatch).__name__} (expected a microbatch: "
            f"use megatron_dip.families.iterators.data_sets)"
        )
    return microbatch.item_sizes


def _reduces_early(model: Sequence[torch.nn.Module]) -> bool:
    """Whether gradients may be reduced as soon as a stage's last backward is done.

    Without overlap a reduction blocks, and finalizing would do it a second time; with several
    optimizer instances its handle is lost, with the same effect.
    """
    ddp_config = getattr(model[0], "ddp_config", None)
    return bool(
        ddp_config is not None
        and ddp_config.overlap_grad_reduce
        and ddp_config.num_distributed_optimizer_instances == 1
    )


def _without_gradient_sync(model: Sequence[torch.nn.Module]) -> ExitStack:
    """Megatron's own hooks count backwards of the first batch; a plan's differ per batch."""
    stack = ExitStack()
    for chunk in model:
        if hasattr(chunk, "no_sync"):
            stack.enter_context(chunk.no_sync())  # type: ignore[operator]
    return stack


def _boundaries_in_16_bits(model: Sequence[torch.nn.Module], plan: Plan) -> ExitStack:
    """Megatron's 16-bit wrapper turns all outputs of the last rank into 32 bits, not losses only.

    It takes them for losses because no virtual pipeline is on.
    """
    stack = ExitStack()
    for chunk in model:
        if plan.graph.is_loss_stage(get_attr_wrapped_model(chunk, "stage").stage):
            continue
        wrapper = chunk
        while isinstance(wrapper, torch.nn.Module):
            if isinstance(wrapper, Float16Module):
                hook = wrapper.register_forward_pre_hook(_keep_precision, with_kwargs=True)
                stack.enter_context(hook)
            wrapper = getattr(wrapper, "module", None)  # type: ignore[assignment]
    return stack


def _keep_precision(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"fp32_output": False}


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
