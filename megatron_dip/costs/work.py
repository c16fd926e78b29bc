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
from megatron_dip.workload import Problem

__all__ = ["WorkCost", "static_bytes", "work_cost"]


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


def work_cost(graph: PipelineGraph, work: Work) -> WorkCost:
    """The cost of ``work`` under the rules at the top of this file."""
    stage = graph.partition[work.stage]
    module = graph.problem.module(stage.module)
    is_first = graph.partition.first_stage(stage.module).stage == stage.stage
    is_last = graph.partition.last_stage(stage.module).stage == stage.stage
    items = [
        graph.problem.item(stage.module, work.microbatch, number)
        for number in graph.sub_microbatch(work).items
    ]
    overhead = module.layer_overhead_us
    layers = stage.num_layers
    forward = layers * (overhead + sum(item.forward_us for item in items))
    input_grad = layers * (overhead + sum(item.input_grad_us for item in items))
    weight_grad = layers * sum(item.weight_grad_us for item in items)
    if is_first:
        forward += module.first_layer_extra.forward_us
        forward += sum(item.first_extra_forward_us for item in items)
        input_grad += sum(item.first_extra_input_grad_us for item in items)
        weight_grad += sum(item.first_extra_weight_grad_us for item in items)
    if is_last:
        forward += module.last_layer_extra.forward_us
        forward += sum(item.last_extra_forward_us for item in items)
        input_grad += sum(item.last_extra_input_grad_us for item in items)
        weight_grad += sum(item.last_extra_weight_grad_us for item in items)
    if not graph.has_backward(work.stage):
        return WorkCost(forward, 0.0, 0.0, 0.0, 0, 0)
    if not graph.has_weight_grad(work.stage):
        weight_grad = 0.0
    activation = sum(item.activation_bytes for item in items)
    boundary = sum(item.boundary_bytes for item in items)
    recompute = overhead + sum(item.effective_recompute_us for item in items)
    return WorkCost(
        forward, input_grad, weight_grad, recompute, layers * activation, activation - boundary
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
