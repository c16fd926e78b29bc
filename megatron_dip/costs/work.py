"""Time and memory of one sub-microbatch in one stage, from the costs of its items.

With L the layers of the stage, of which B have a backward and T are trained (see
``megatron_dip.plan.trained``), and sums over the items of the sub-microbatch:

- forward: L x overhead + L x sum(forward) + extras
- input gradient: B x overhead + B x sum(input_grad) + extras with a backward
  + recomputed layers x (overhead + sum(recompute))
- weight gradient: T x sum(weight_grad) + trained extras
- stored from the start of the forward to the end of the backward: of the B layers, per item
  ``activation_bytes`` for each stored and ``boundary_bytes`` for each recomputed one, and the bytes
  of extras with a backward; of what sits before the first layer also where that layer, in the same
  stage, has one.  An offloaded layer takes its ``activation_bytes`` to the host.

Times of a stage that ``stage_factors`` names are multiplied by its factors at the end.

Extras are what sits before a module's first layer (in its first stage) or after its last layer
(in its last stage).
"""

from typing import NamedTuple

import numpy as np

from megatron_dip.compiled import compiled
from megatron_dip.partition import Partition
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.wiring import FloatArray, IntArray
from megatron_dip.workload import Problem, StageFactor

__all__ = ["WorkCosts", "static_bytes", "work_costs"]


class WorkCosts(NamedTuple):
    """Times in microseconds and memory in bytes of all works of a batch, [N] each."""

    forward_us: FloatArray
    input_grad_us: FloatArray
    """Zero, like the weight gradient, where the work has no backward."""
    weight_grad_us: FloatArray
    recompute_layer_us: FloatArray
    """Added to the input gradient for each recomputed layer."""
    stored_bytes: IntArray
    """Without recompute."""
    saved_layer_bytes: IntArray
    """Taken off ``stored_bytes`` by each recomputed layer."""
    layer_bytes: IntArray
    """What one of the B layers keeps."""
    boundary_bytes: IntArray
    """What a transfer of the work's output, or of its gradient, moves."""

    def input_grad_with(self, num_recomputed: IntArray) -> FloatArray:
        """[N]: input gradients where ``num_recomputed`` ([N]) layers are recomputed."""
        return self.input_grad_us + num_recomputed * self.recompute_layer_us


_TIMES = (
    "forward_us",
    "input_grad_us",
    "weight_grad_us",
    "effective_recompute_us",
    "first_extra_forward_us",
    "first_extra_input_grad_us",
    "first_extra_weight_grad_us",
    "last_extra_forward_us",
    "last_extra_input_grad_us",
    "last_extra_weight_grad_us",
)
_BYTES = (
    "activation_bytes",
    "boundary_bytes",
    "first_extra_activation_bytes",
    "last_extra_activation_bytes",
)


def work_costs(graph: PipelineGraph) -> WorkCosts:
    """The cost of every work of ``graph`` under the rules at the top of this file."""
    wiring, stages = graph.wiring, graph.stages
    times_us, num_bytes = _sums(graph)
    times_us, num_bytes = times_us[:, wiring.group], num_bytes[:, wiring.group]
    modules = [graph.problem.module(stage.module) for stage in stages]
    overhead_us = np.array([module.layer_overhead_us for module in modules])[wiring.place]
    layers = np.array([stage.num_layers for stage in stages], dtype=np.int64)[wiring.place]
    forward_us = layers * (overhead_us + times_us[0])
    backwards = [graph.backwards[stage.stage] for stage in stages]
    with_backward = np.array([len(b.layers) for b in backwards], dtype=np.int64)[wiring.place]
    trained = np.array([b.num_trained_layers for b in backwards], dtype=np.int64)[wiring.place]
    input_grad_us = with_backward * (overhead_us + times_us[1])
    weight_grad_us = trained * times_us[2]
    activation_bytes, boundary_bytes, first_bytes, last_bytes = num_bytes
    kept_bytes = with_backward * activation_bytes
    first_extras = [module.first_layer_extra for module in modules]
    last_extras = [module.last_layer_extra for module in modules]
    first_shares = [(b.first_extra, b.trains_first_extra, b.keeps_first_extra) for b in backwards]
    last_shares = [(b.last_extra, b.trains_last_extra, b.last_extra) for b in backwards]
    ends = (
        (graph.partition.first_stage, first_extras, first_shares, times_us[4:7], first_bytes),
        (graph.partition.last_stage, last_extras, last_shares, times_us[7:], last_bytes),
    )
    for end_of, extras, shares, extra_us, extra_bytes in ends:
        extra_forward_us, extra_input_grad_us, extra_weight_grad_us = extra_us
        is_end = np.array([end_of(stage.module) is stage for stage in stages])[wiring.place]
        has_backward, is_trained, is_kept = np.array(shares)[wiring.place].T
        fixed_us = np.array([extra.forward_us for extra in extras])[wiring.place]
        forward_us += is_end * fixed_us
        forward_us += is_end * extra_forward_us
        input_grad_us += has_backward * extra_input_grad_us
        weight_grad_us += is_trained * extra_weight_grad_us
        kept_bytes += is_kept * extra_bytes
    factors = graph.problem.stage_factors or {}
    by_stage = [factors.get(stage.stage, StageFactor()) for stage in stages]
    forward_factor, backward_factor = np.array(by_stage, dtype=np.float64)[wiring.place].T
    return WorkCosts(
        forward_us=forward_factor * forward_us,
        input_grad_us=backward_factor * input_grad_us,
        weight_grad_us=backward_factor * weight_grad_us,
        recompute_layer_us=wiring.has_backward * backward_factor * (overhead_us + times_us[3]),
        stored_bytes=kept_bytes,
        saved_layer_bytes=wiring.has_backward * (activation_bytes - boundary_bytes),
        layer_bytes=wiring.has_backward * activation_bytes,
        boundary_bytes=boundary_bytes,
    )


def _sums(graph: PipelineGraph) -> tuple[FloatArray, IntArray]:
    """[10, G] times and [4, G] bytes of all sub-microbatches, in the order of their names above."""
    groups = graph.sub_microbatches
    items = [
        graph.problem.item(group.module, group.microbatch, number)
        for group in groups
        for number in group.items
    ]
    first_item = np.cumsum([0, *(len(group.items) for group in groups)])
    times_us = np.array([[getattr(item, name) for item in items] for name in _TIMES], np.float64)
    num_bytes = np.array([[getattr(item, name) for item in items] for name in _BYTES], np.int64)
    sums_us = np.empty((len(_TIMES), len(groups)))
    _sum_groups(times_us, first_item, sums_us)
    return sums_us, np.add.reduceat(num_bytes, first_item[:-1], axis=1)


@compiled
def _sum_groups(values: FloatArray, first: IntArray, sums: FloatArray) -> None:
    """Sums of groups of columns, rounded once (Neumaier, "Rundungsfehleranalyse einiger Verfahren
    zur Summation endlicher Summen", ZAMM 54, 1974): the order of items makes no difference.

    Args:
        values: [K, I]
        first: [G + 1]: group g has the columns first[g] to first[g + 1].
        sums: [K, G], filled in.
    """
    for row in range(len(values)):
        for group in range(len(first) - 1):
            total, rest = 0.0, 0.0
            for column in range(first[group], first[group + 1]):
                value = values[row, column]
                raised = total + value
                if abs(total) >= abs(value):
                    rest += (total - raised) + value
                else:
                    rest += (value - raised) + total
                total = raised
            sums[row, group] = total + rest


def static_bytes(problem: Problem, partition: Partition, rank: int) -> int:
    """Bytes of weights, gradients and optimizer state that ``rank`` holds."""
    total = 0
    for stage in partition.stages_on(rank):
        module = problem.module(stage.module)
        num_trained, frozen_bytes = (
            module.num_trained(stage.layers),
            module.frozen_layer_static_bytes,
        )
        if frozen_bytes is None:
            frozen_bytes = module.layer_static_bytes
        total += module.layer_static_bytes * num_trained
        total += frozen_bytes * (stage.num_layers - num_trained)
        if partition.first_stage(stage.module).stage == stage.stage:
            total += module.first_layer_extra.static_bytes
        if partition.last_stage(stage.module).stage == stage.stage:
            total += module.last_layer_extra.static_bytes
    return total
