"""Measured action times back into costs: one factor per stage, for forwards and for backwards.

A stage sits on one rank, so that its factors say both how far a module's costs are off and how
much slower a rank is than the others.  They are ratios of sums over one iteration, in which single
actions count no more than ``_OUTLIER`` times off the iteration's middle; of these ratios the median
over the last iterations counts, so that one of them alone moves nothing, and a stage stays within a
bounded distance of the others of its module.  A stage that was never measured is taken to be like
them.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

import numpy as np

from megatron_dip.partition import Partition
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.graph import Work
from megatron_dip.plan.plan import Plan
from megatron_dip.plan.wiring import FloatArray
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import StageFactor

__all__ = ["CostFeedback", "MeasuredActions", "measure_actions"]

_LEAST_US = 1e-3
"""Shorter actions, stated or measured, say nothing."""
_OUTLIER = 2.0
_WINDOW = 5
"""Iterations; what lasts is followed after half of them."""
_LARGEST_SPREAD = 4.0
"""Of a stage from the median of its module."""
_SMALLEST_CHANGE = 0.03
"""Changes of all factors below this leave the costs, and with them the plans, as they are."""
_FORWARD, _BACKWARD = range(2)


class MeasuredActions(NamedTuple):
    """One iteration on one rank."""

    sums_us: FloatArray
    """[S, 2, 2] by place of the stage in ``partition.stages``, forward or backward, measured or
    stated by the items."""
    error: float
    """Median over actions of the part by which the plan's own prediction was off."""


def measure_actions(plan: Plan, durations_us: Iterable[tuple[Action, float]]) -> MeasuredActions:
    """What ``durations_us`` of compute actions say of the costs of ``plan.problem``."""
    table = build_task_table(plan.graph, plan.recomputed_layers)
    predicted = {
        ActionType.FORWARD: table.forward_us,
        ActionType.BACKWARD: table.backward_us,
        ActionType.INPUT_GRAD: table.input_grad_us,
        ActionType.WEIGHT_GRAD: table.weight_grad_us,
    }
    factors = plan.problem.stage_factors or {}
    place_of = {stage.stage: place for place, stage in enumerate(plan.partition.stages)}
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    errors = []
    for action, measured_us in durations_us:
        number = plan.graph.numbers[Work(action.stage, action.microbatch or 0, action.sub)]
        expected_us = float(predicted[action.type][number])
        if expected_us < _LEAST_US or measured_us < _LEAST_US:
            continue
        phase = _FORWARD if action.type is ActionType.FORWARD else _BACKWARD
        stated_us = expected_us / factors.get(action.stage, StageFactor())[phase]
        found.setdefault((place_of[action.stage], phase), []).append((measured_us, stated_us))
        errors.append(abs(measured_us - expected_us) / expected_us)
    sums_us = np.zeros((len(place_of), 2, 2))
    for key, times in found.items():
        middle = median(measured / stated for measured, stated in times)
        for measured, stated in times:
            low, high = stated * middle / _OUTLIER, stated * middle * _OUTLIER
            sums_us[key] += min(max(measured, low), high), stated
    return MeasuredActions(sums_us, median(errors) if errors else 0.0)


class CostFeedback:
    """The factors of all stages, from what the ranks measure; the same on all that get the same."""

    def __init__(self, partition: Partition) -> None:
        self._stages = partition.stages
        self._seen: dict[tuple[int, int], deque[float]] = {}
        self._num_updates = 0
        self.factors: Mapping[int, StageFactor] | None = None
        """By stage number, as ``Problem.stage_factors`` wants them; None before the first update.
        Replaced by an update that changes something, never changed in place."""

    def update(self, sums_us: FloatArray) -> bool:
        """Follow one iteration.

        Args:
            sums_us: As in :class:`MeasuredActions`, added up over the ranks.

        Returns:
            Whether ``factors`` are others than before.
        """
        for place in range(len(self._stages)):
            for phase in (_FORWARD, _BACKWARD):
                measured_us, stated_us = sums_us[place, phase]
                if measured_us > 0.0 and stated_us > 0.0:
                    seen = self._seen.setdefault((place, phase), deque(maxlen=_WINDOW))
                    if self._num_updates == 1:
                        # The first iteration warmed up.
                        seen.clear()
                    seen.append(math.log(measured_us / stated_us))
        self._num_updates += 1
        return self._publish()

    def _publish(self) -> bool:
        made = {
            stage.stage: StageFactor(*(math.exp(self._log(place, phase)) for phase in range(2)))
            for place, stage in enumerate(self._stages)
        }
        before = self.factors
        if before is not None and all(
            abs(math.log(new / old)) < _SMALLEST_CHANGE
            for stage, factor in made.items()
            for new, old in zip(factor, before[stage], strict=True)
        ):
            return False
        self.factors = made
        return True

    def _log(self, place: int, phase: int) -> float:
        module = self._stages[place].module
        peers = [
            median(seen)
            for (other, other_phase), seen in self._seen.items()
            if other_phase == phase and self._stages[other].module == module
        ]
        if not peers:
            return 0.0
        middle, limit = median(peers), math.log(_LARGEST_SPREAD)
        seen = self._seen.get((place, phase))
        own = median(seen) if seen else middle
        return min(max(own, middle - limit), middle + limit)
