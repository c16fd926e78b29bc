"""Time and memory of one sub-microbatch in one stage, from the costs of its items.

With L the layers of the stage and sums over the items of the sub-microbatch:

- forward: L x overhead + L x sum(forward) + extras
- input gradient: L x overhead + L x sum(input_grad) + extras
  + recomputed layers x (overhead + sum(recompute))
- weight gradient: L x sum(weight_grad) + extras
- stored from the start of the forward to the end of the backward: per item ``activation_bytes``
  for each stored and ``boundary_bytes`` for each recomputed layer; nothing without a backward.

Extras are what sits before a module's first layer (in its first stage) or after its last layer
(in its last stage).
"""

from typing import NamedTuple

from megatron_dip.partition import Partition
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.workload import Item, LayerExtra, Problem

__all__ = ["WorkCost", "static_bytes", "work_cost", "work_costs"]


class WorkCost(NamedTuple):
    """Times in microseconds, memory in bytes."""

    forward_us: float
    input_grad_us: float
    """Zero, like the weight gradient, where the work has no backward."""
    weight_grad_us: float
    recompute_layer_us: float
    """Added to the input gradient for each recomputed layer."""
    stored_bytes: int
    """Without recompute."""
    saved_layer_bytes: int
    """Taken off ``stored_bytes`` by each recomputed layer."""


class _Totals(NamedTuple):
    """Sums over the items of one sub-microbatch, the same in all stages of its module."""

    forward_us: float
    input_grad_us: float
    weight_grad_us: float
    recompute_us: float
    first_extra_us: tuple[float, float, float]
    """Forward, input gradient, weight gradient."""
    last_extra_us: tuple[float, float, float]
    activation_bytes: int
    boundary_bytes: int


def _totals(items: list[Item]) -> _Totals:
    return _Totals(
        forward_us=sum(item.forward_us for item in items),
        input_grad_us=sum(item.input_grad_us for item in items),
        weight_grad_us=sum(item.weight_grad_us for item in items),
        recompute_us=sum(item.effective_recompute_us for item in items),
        first_extra_us=(
            sum(item.first_extra_forward_us for item in items),
            sum(item.first_extra_input_grad_us for item in items),
            sum(item.first_extra_weight_grad_us for item in items),
        ),
        last_extra_us=(
            sum(item.last_extra_forward_us for item in items),
            sum(item.last_extra_input_grad_us for item in items),
            sum(item.last_extra_weight_grad_us for item in items),
        ),
        activation_bytes=sum(item.activation_bytes for item in items),
        boundary_bytes=sum(item.boundary_bytes for item in items),
    )


def work_cost(graph: PipelineGraph, work: Work) -> WorkCost:
    """The cost of ``work`` under the rules at the top of this file."""
    return _work_cost(graph, work, _work_totals(graph, work))


def work_costs(graph: PipelineGraph) -> dict[Work, WorkCost]:
    """The cost of every work of the batch; sums over items are made once for all stages."""
    totals: dict[tuple[str, int, int], _Totals] = {}
    costs: dict[Work, WorkCost] = {}
    for work in graph.works:
        key = (graph.partition[work.stage].module, work.microbatch, work.sub)
        if key not in totals:
            totals[key] = _work_totals(graph, work)
        costs[work] = _work_cost(graph, work, totals[key])
    return costs


def _work_totals(graph: PipelineGraph, work: Work) -> _Totals:
    group = graph.sub_microbatch(work)
    return _totals(
        [graph.problem.item(group.module, group.microbatch, number) for number in group.items]
    )


def _work_cost(graph: PipelineGraph, work: Work, totals: _Totals) -> WorkCost:
    stage = graph.partition[work.stage]
    module = graph.problem.module(stage.module)
    overhead = module.layer_overhead_us
    layers = stage.num_layers
    forward = layers * (overhead + totals.forward_us)
    input_grad = layers * (overhead + totals.input_grad_us)
    weight_grad = layers * totals.weight_grad_us
    extras: list[tuple[LayerExtra, tuple[float, float, float]]] = []
    if graph.partition.first_stage(stage.module).stage == stage.stage:
        extras.append((module.first_layer_extra, totals.first_extra_us))
    if graph.partition.last_stage(stage.module).stage == stage.stage:
        extras.append((module.last_layer_extra, totals.last_extra_us))
    for fixed, (extra_forward, extra_input_grad, extra_weight_grad) in extras:
        forward += fixed.forward_us
        forward += extra_forward
        input_grad += extra_input_grad
        weight_grad += extra_weight_grad
    if not graph.has_backward(work.stage):
        return WorkCost(forward, 0.0, 0.0, 0.0, 0, 0)
    if not graph.has_weight_grad(work.stage):
        weight_grad = 0.0
    return WorkCost(
        forward_us=forward,
        input_grad_us=input_grad,
        weight_grad_us=weight_grad,
        recompute_layer_us=overhead + totals.recompute_us,
        stored_bytes=layers * totals.activation_bytes,
        saved_layer_bytes=totals.activation_bytes - totals.boundary_bytes,
    )


def static_bytes(problem: Problem, partition: Partition, rank: int) -> int:
    """Bytes of weights, gradients and optimizer state that ``rank`` holds."""
    total = 0
    for stage in partition.stages_on(rank):
        module = problem.module(stage.module)
        total += module.layer_static_bytes * stage.num_layers
        if partition.first_stage(stage.module).stage == stage.stage:
            total += module.first_layer_extra.static_bytes
        if partition.last_stage(stage.module).stage == stage.stage:
            total += module.last_layer_extra.static_bytes
    return total
