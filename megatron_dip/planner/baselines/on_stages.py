"""Schedules of other systems, and of this one without its techniques, on a plan's own stages.

Published ideas are approximated; the *backbone* is the last module, *encoders* are all others:

- *Encoder in bubbles* (Optimus, ATC 2025): the backbone runs in Megatron's order, 1F1B with one
  segment and interleaved with several, and encoders only fill its gaps.  Optimus keeps the encoder
  apart from the pipeline's stages and knows bubbles from a profile; here encoders are cut into the
  plan's stages and bubbles are those of the very batch.
- *Optimus, coarse*: the same with the bubbles at both ends alone, which is what DIP compares with:
  a rank runs all forwards of encoders before its first backward of the backbone, and all their
  backwards after its last forward of the backbone.
- *Nested encoder* (BigMac, 2026): the same, but an encoder's stage holds at most one microbatch
  more than Megatron's order holds in the backbone's first stage, so that the encoders' activations
  do not grow with the batch.

Neither reorders microbatches nor looks at the memory limit.
"""

import numpy as np

from megatron_dip.partition import Stage
from megatron_dip.planner.baselines.filling import InFlightLimit, fill_gaps
from megatron_dip.planner.baselines.megatron_orders import (
    Step,
    interleaved_order,
    one_f_one_b_order,
)
from megatron_dip.planner.dual_queue import default_priority, priority_key
from megatron_dip.planner.greedy import schedule_greedily
from megatron_dip.planner.kernels import ALTERNATE
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import IntArray, TaskOrder, awaiting
from megatron_dip.simulator.tasks import TaskTable

__all__ = [
    "order_as_given",
    "order_encoder_in_bubbles",
    "order_nested_encoder",
    "order_optimus_coarse",
]


def order_encoder_in_bubbles(table: TaskTable) -> TaskOrder:
    """Megatron's order of the backbone, encoders in its gaps.

    Raises:
        InfeasibleError: The backbone has several segments and there are fewer microbatches than
            ranks, which Megatron refuses.
    """
    return fill_gaps(table.whole, _backbone_tasks(table), _forwards_first(table))


def order_optimus_coarse(table: TaskTable) -> TaskOrder:
    """Megatron's order of the backbone, encoders in the bubbles before and after its steady part.

    Raises:
        InfeasibleError: See :func:`order_encoder_in_bubbles`.
    """
    fixed = _backbone_tasks(table)
    is_free = table.whole.exists.copy()
    is_free[[task for tasks in fixed for task in tasks]] = False
    rank = np.tile(table.whole.rank, 3)
    before: list[int] = []
    after: list[int] = []
    for number, tasks in enumerate(fixed):
        others = np.flatnonzero(is_free & (rank == number)).tolist()
        forwards = [task for task in others if task < table.num_works]
        backwards = [task for task in others if task >= table.num_works]
        first = next((task for task in tasks if task >= table.num_works), None)
        last = next((task for task in reversed(tasks) if task < table.num_works), None)
        if first is not None:
            before += forwards
            after += [first] * len(forwards)
        if last is not None:
            before += [last] * len(backwards)
            after += backwards
    graph = awaiting(table.whole, np.array(before, np.int64), np.array(after, np.int64))
    return fill_gaps(graph, fixed, _forwards_first(table))


def order_nested_encoder(table: TaskTable) -> TaskOrder:
    """Megatron's order of the backbone, encoders in its gaps and hardly ahead of it.

    Raises:
        InfeasibleError: See :func:`order_encoder_in_bubbles`.
    """
    num_microbatches = table.graph.problem.num_microbatches
    backbone = [stage.stage for stage in _backbone(table)]
    stages, pool = np.unique(table.stage, return_inverse=True)
    is_limited = table.has_backward & ~np.isin(table.stage, backbone)
    limit = InFlightLimit(
        holder=np.where(is_limited, pool * num_microbatches + table.microbatch, -1),
        pool=np.repeat(np.arange(len(stages)), num_microbatches),
        max_held=1 + _num_held(_backbone_order(table, rank=0)),
    )
    return fill_gaps(table.whole, _backbone_tasks(table), _forwards_first(table), limit)


def order_as_given(table: TaskTable) -> TaskOrder:
    """The dual queue with its default rule, microbatches entering in the order of the batch.

    Raises:
        InfeasibleError: A single microbatch does not fit into the memory of a rank.
    """
    batch = BatchRules.forwards(table, split_backward=False)
    backward = priority_key(default_priority(table))[table.num_works :]
    key = np.concatenate([_oldest_first(table), backward])
    order = np.arange(table.graph.problem.num_microbatches)
    return schedule_greedily(batch, batch.make(key, ALTERNATE, order)).order


def _backbone(table: TaskTable) -> tuple[Stage, ...]:
    return table.graph.partition.chains[table.graph.problem.module_order[-1]]


def _backbone_order(table: TaskTable, rank: int) -> list[Step]:
    num_segments = 1 + max(stage.segment for stage in _backbone(table))
    num_microbatches = table.graph.problem.num_microbatches
    if num_segments == 1:
        return one_f_one_b_order(table.num_ranks, num_microbatches, rank)
    return interleaved_order(table.num_ranks, num_segments, num_microbatches, rank)


def _num_held(steps: list[Step]) -> int:
    """Most microbatches that the first piece of a rank holds at once."""
    held = np.cumsum([1 - 2 * step.is_backward for step in steps if step.chunk == 0])
    return int(held.max())


def _backbone_tasks(table: TaskTable) -> list[list[int]]:
    """Per rank, the backbone's tasks in Megatron's order."""
    stages = {stage.stage: stage for stage in _backbone(table)}
    works: dict[tuple[int, int, int], list[int]] = {}
    places = zip(table.stage.tolist(), table.microbatch.tolist(), strict=True)
    for work, (number, microbatch) in enumerate(places):
        if number in stages:
            key = (stages[number].rank, stages[number].segment, microbatch)
            works.setdefault(key, []).append(work)
    exists = table.whole.exists
    lines = []
    for rank in range(table.num_ranks):
        tasks = [
            work + table.num_works * step.is_backward
            for step in _backbone_order(table, rank)
            for work in works.get((rank, step.chunk, step.microbatch), ())
        ]
        lines.append([task for task in tasks if exists[task]])
    return lines


def _forwards_first(table: TaskTable) -> IntArray:
    """[3 N]: keys by kind and microbatch; the backbone waits for forwards."""
    kinds = np.repeat(np.arange(3), table.num_works)
    return kinds * table.num_works + np.tile(_oldest_first(table), 3)


def _oldest_first(table: TaskTable) -> IntArray:
    """[N]: the place of every work, by microbatch."""
    return np.argsort(np.argsort(table.microbatch, kind="stable"))
