"""What of a stage takes part in backwards: the one place where trainability becomes a stage's.

Backwards run from the loss to the first thing that is trained, and no further.  A stage with
nothing trained in it or before it has none; one that is frozen behind something trained passes
gradients on (input gradients alone); only trained layers and extras have weight gradients.
"""

from typing import NamedTuple

from megatron_dip.partition import Partition, Stage
from megatron_dip.workload import Problem

__all__ = ["StageBackward", "stage_backward"]


class StageBackward(NamedTuple):
    """The share of one stage in backwards."""

    layers: range
    """Its layers that have a backward: the last ones of the stage."""
    num_trained_layers: int
    first_extra: bool
    """Whether it holds what sits before its module's first layer, and that has a backward."""
    last_extra: bool
    """The same of what sits after the last layer."""
    keeps_first_extra: bool
    """Whether it holds what sits before its module's first layer, and that or the first layer has a
    backward: a layer keeps what it reads."""
    trains_first_extra: bool
    trains_last_extra: bool

    @property
    def has_backward(self) -> bool:
        return bool(self.layers) or self.first_extra or self.last_extra

    @property
    def has_weight_grad(self) -> bool:
        return bool(self.num_trained_layers) or self.trains_first_extra or self.trains_last_extra


def stage_backward(problem: Problem, partition: Partition, stage: Stage) -> StageBackward:
    """What of ``stage`` takes part in backwards."""
    module = problem.module(stage.module)
    first = problem.first_with_backward.get(stage.module)
    is_first = partition.first_stage(stage.module) is stage
    is_last = partition.last_stage(stage.module) is stage
    stop = stage.layers.stop
    start = stop if first is None else min(max(first, stage.first_layer), stop)
    return StageBackward(
        layers=range(start, stop),
        num_trained_layers=module.num_trained(stage.layers),
        first_extra=is_first and first == -1,
        last_extra=is_last and first is not None,
        keeps_first_extra=is_first and (first == -1 or (first == 0 and start < stop)),
        trains_first_extra=is_first and module.trains_first_extra,
        trains_last_extra=is_last and module.trains_last_extra,
    )
