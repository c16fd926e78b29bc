"""``--dip-check-parts``: whether the parts of a microbatch give the loss of the whole one.

A loss that is no sum over samples, or a model that mixes the samples of a microbatch, would train
another model when a module's microbatch is split.  The first batch with a split microbatch is run
forward twice more, split and whole, without dropout, and what the loss function reports compared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.runner import MegatronRunner
from megatron_dip.planner import PlannedBatch, make_plan

__all__ = ["check_parts"]

RunnerOf = Callable[[PlannedBatch], MegatronRunner]


def check_parts(
    pipeline: DipPipeline,
    model: Sequence[torch.nn.Module],
    planned: PlannedBatch,
    runner_of: RunnerOf,
) -> None:
    """Run ``planned`` forward and compare, if a microbatch is split in it; once per run.

    The same call on all ranks of a pipeline.

    Args:
        runner_of: Makes what runs the stages under a plan.

    Raises:
        UnsupportedError: Split and whole microbatches differ; on all ranks.
    """
    plan = planned.plan
    split = sorted({sub.module for sub in plan.sub_microbatches if sub.sub})
    if not split:
        return
    pipeline.checks_parts = False
    whole = make_plan(
        plan.problem,
        plan.partition,
        algorithm="one_f_one_b",
        max_tokens=dict.fromkeys(module.name for module in plan.problem.modules),
        when_infeasible="least_memory",
        queues=plan.queues,
    )
    reports = []
    with _evaluating(model):
        for one in (planned, planned._replace(plan=whole)):
            runner = runner_of(one)
            pipeline.executor.run(one, runner, forward_only=True)
            reports.append(runner.reports.in_order())
    difference = _difference(*reports, tolerance=_tolerance(model))
    differs = torch.tensor(int(bool(difference)), device=pipeline.device)
    dist.all_reduce(differs, group=mpu.get_pipeline_model_parallel_group())
    if differs:
        raise UnsupportedError(
            f"parts of a microbatch do not give the loss of the whole one, with "
            f"sub_microbatch_tokens of {' and '.join(split)}: "
            f"{difference or 'see the log of the last pipeline rank'} (leave "
            f"sub_microbatch_tokens out, or have the loss function return the sum over tokens and "
            f"their number)"
        )


@contextmanager
def _evaluating(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(model, training, strict=True):
            chunk.train(was_training)


def _tolerance(model: Sequence[torch.nn.Module]) -> float:
    """Relative: what another order of summing leaves, in the type of the weights."""
    dtypes = {parameter.dtype for chunk in model for parameter in chunk.parameters()}
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 2e-2


def _difference(in_parts: Sequence[Any], as_whole: Sequence[Any], *, tolerance: float) -> str:
    """The first report that differs; empty where none does, and on ranks without reports."""
    for number, (parts, whole) in enumerate(zip(in_parts, as_whole, strict=True)):
        for name in whole:
            one, other = torch.as_tensor(parts[name]), torch.as_tensor(whole[name])
            if not torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance):
                return (
                    f"{name!r} of microbatch {number} is {one.tolist()} in parts and "
                    f"{other.tolist()} as a whole"
                )
    return ""
