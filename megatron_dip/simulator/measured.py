"""Measured action times back into costs: factors per stage, and the overhead of a layer per module.

A stage sits on one rank, so that its two factors (forwards, backwards) say both how far a module's
costs are off and how much slower a rank is than the others.  They are ratios of sums over one
iteration, in which single actions count no more than ``_OUTLIER`` times off the iteration's middle;
of these ratios the median over the last iterations counts, so that one of them alone moves nothing,
and a stage stays within a bounded distance of the others of its module.  A stage that was never
measured is taken to be like them.

A factor cannot say that small actions take longer than their work: what calling a layer takes by
itself is the offset of the straight line through an iteration's actions, measured time over stated
work, and follows from it where actions differ enough in size.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple, Protocol

import numpy as np

from megatron_dip.limits import MOST_FACTOR
from megatron_dip.partition import Partition
from megatron_dip.plan.actions import Action, ActionType, parse_actions
from megatron_dip.plan.graph import Work
from megatron_dip.plan.plan import Plan
from megatron_dip.plan.wiring import FloatArray
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import StageFactor

__all__ = [
    "SUMS_SHAPE",
    "Corrections",
    "CostFeedback",
    "MeasuredActions",
    "action_durations_us",
    "measure_actions",
    "stated_overheads",
]

_OUTLIER = 2.0
_WINDOW = 5
"""Iterations; what lasts is followed after half of them."""
_LARGEST_SPREAD = 4.0
"""Of a stage from the median of its module."""
_LARGEST_LOG = math.log(MOST_FACTOR) * (1 - 1e-12)
_SMALLEST_CHANGE = 0.03
"""Changes of all factors below this leave the costs, and with them the plans, as they are."""
_SMALLEST_OVERHEAD_CHANGE = 0.25
"""The same of an overhead; a line through scattered points says it less exactly."""
_FEWEST_ACTIONS = 8
"""That a line is drawn through."""
_FEWEST_UPDATES = 3
"""Before an overhead is followed; the first warms up."""
_LEAST_VARIATION = 0.15
"""Standard deviation over mean of the work of these actions."""
_LEAST_SLOPE = 0.1
"""Part of an action's time that its work accounts for, at least."""
_FORWARD, _BACKWARD = range(2)
_MEASURED, _WORK, _CALLS, _COUNT, _X, _Y, _XX, _XY = range(8)
"""Columns of the sums: measured time, stated work, calls of layers; and of the line's points their
number, sums of work and of time, and sums of the products."""

SUMS_SHAPE = (2, 8)
"""Per stage: forward or backward, and the columns."""


class _Span(Protocol):
    """One piece of work or wait, in microseconds of one clock."""

    @property
    def label(self) -> object: ...
    @property
    def start_us(self) -> float: ...
    @property
    def end_us(self) -> float: ...
    @property
    def is_wait(self) -> bool: ...
    @property
    def is_device(self) -> bool: ...


class MeasuredActions(NamedTuple):
    """One iteration on one rank."""

    sums: FloatArray
    """[S, 2, 8] by place of the stage in ``partition.stages``; work is without overheads and
    without factors of stages."""
    error: float
    """Median over actions of the part by which the plan's own prediction was off."""


class _Point(NamedTuple):
    """One action."""

    measured_us: float
    work_us: float
    num_calls: int
    """Of layers, which an overhead goes with."""


class Corrections(NamedTuple):
    """What follows for the costs."""

    factors: Mapping[int, StageFactor]
    """By stage number, as ``Problem.stage_factors`` wants them."""
    overheads_us: Mapping[str, float]
    """Of calling a layer, per module."""


def stated_overheads(plan: Plan) -> dict[str, float]:
    """What ``plan.problem`` says of calling a layer, per module."""
    return {module.name: module.layer_overhead_us for module in plan.problem.modules}


def action_durations_us(spans: Sequence[_Span]) -> Iterator[tuple[Action, float]]:
    """What every compute action of a rank took.

    Where the device measured, that is from its own begin to its own end: the host is elsewhere by
    then, and its spans lie anywhere between.  Where the host computes, it is from the end of what
    was before it to its own end, or to the wait that follows it, where one does: the host's part of
    an action belongs to it (sends and receives are posted after it), and its wait does not.

    Args:
        spans: Of one rank in one iteration, in order; labels are actions, or text of them.
    """
    before_us: float | None = None
    for number, span in enumerate(spans):
        action = None if span.is_wait else _action(span.label)
        if action is not None and span.is_device:
            yield action, span.end_us - span.start_us
        elif action is not None:
            begin_us = span.start_us if before_us is None else min(before_us, span.start_us)
            after = spans[number + 1] if number + 1 < len(spans) else span
            end_us = max(after.start_us, span.end_us) if after.is_wait else span.end_us
            yield action, end_us - begin_us
        before_us = span.end_us


def _action(label: object) -> Action | None:
    """None where a rank did something else than a compute action."""
    if isinstance(label, str) and label[:1].isdigit():
        (label,) = parse_actions(label)
    return label if isinstance(label, Action) and label.type.is_compute else None


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
    overheads = stated_overheads(plan)
    place_of = {stage.stage: place for place, stage in enumerate(plan.partition.stages)}
    found: dict[tuple[int, int], list[_Point]] = {}
    errors = []
    for action, measured_us in durations_us:
        number = plan.graph.numbers[Work(action.stage, action.microbatch or 0, action.sub)]
        expected_us = float(predicted[action.type][number])
        if expected_us <= 0.0 or measured_us <= 0.0:
            continue
        phase = _FORWARD if action.type is ActionType.FORWARD else _BACKWARD
        stated_us = expected_us / factors.get(action.stage, StageFactor())[phase]
        stage = plan.partition[action.stage]
        num_calls = _num_calls(plan, action, int(table.num_recomputed[number]))
        work_us = stated_us - num_calls * overheads[stage.module]
        point = _Point(measured_us, max(0.0, work_us), num_calls)
        found.setdefault((place_of[action.stage], phase), []).append(point)
        errors.append(abs(measured_us - expected_us) / expected_us)
    sums = np.zeros((len(place_of), *SUMS_SHAPE))
    modules = [stage.module for stage in plan.partition.stages]
    for key, points in found.items():
        sums[key] = _sums(points, overheads[modules[key[0]]])
    return MeasuredActions(sums, median(errors) if errors else 0.0)


def _num_calls(plan: Plan, action: Action, num_recomputed: int) -> int:
    """Calls of layers that an action's overhead stands for."""
    if action.type is ActionType.FORWARD:
        return plan.partition[action.stage].num_layers
    if action.type is ActionType.WEIGHT_GRAD:
        return 0
    return len(plan.graph.backwards[action.stage].layers) + num_recomputed


def _sums(points: list[_Point], overhead_us: float) -> FloatArray:
    """[8], single actions kept near the middle."""
    stated = [point.work_us + point.num_calls * overhead_us for point in points]
    middle = median(point.measured_us / us for point, us in zip(points, stated, strict=True))
    sums = np.zeros(SUMS_SHAPE[1])
    for point, us in zip(points, stated, strict=True):
        low, high = us * middle / _OUTLIER, us * middle * _OUTLIER
        kept_us = min(max(point.measured_us, low), high)
        sums[[_MEASURED, _WORK, _CALLS]] += kept_us, point.work_us, point.num_calls
        if point.num_calls:
            x, y = point.work_us, kept_us
            sums[[_COUNT, _X, _Y, _XX, _XY]] += 1, x, y, x * x, x * y
    return sums


class CostFeedback:
    """Factors of stages and overheads, from what the ranks measure; the same on all that get the
    same.

    Args:
        partition: Of all plans.
        overheads_us: Of calling a layer, per module, as the costs state it.
    """

    def __init__(self, partition: Partition, overheads_us: Mapping[str, float]) -> None:
        self._stages = partition.stages
        self._seen: dict[tuple[int, int], deque[FloatArray]] = {}
        self._num_updates = 0
        self._overheads_us = dict(overheads_us)
        self.corrections: Corrections | None = None
        """None before the first update.  Replaced by an update that changes something, never
        changed in place."""

    @property
    def factors(self) -> Mapping[int, StageFactor] | None:
        """Those of the corrections."""
        return None if self.corrections is None else self.corrections.factors

    def update(self, sums: FloatArray) -> bool:
        """Follow one iteration.

        Args:
            sums: As in :class:`MeasuredActions`, added up over the ranks.

        Returns:
            Whether ``corrections`` are others than before.
        """
        for place in range(len(self._stages)):
            for phase in (_FORWARD, _BACKWARD):
                own = sums[place, phase]
                if own[_MEASURED] > 0.0:
                    seen = self._seen.setdefault((place, phase), deque(maxlen=_WINDOW))
                    if self._num_updates == 1:
                        # The first iteration warmed up.
                        seen.clear()
                    seen.append(own)
        self._num_updates += 1
        return self._publish()

    def _publish(self) -> bool:
        overheads_changed = self._follow_overheads()
        made = {
            stage.stage: StageFactor(*(math.exp(self._log(place, phase)) for phase in range(2)))
            for place, stage in enumerate(self._stages)
        }
        before = self.factors
        if (
            before is not None
            and not overheads_changed
            and all(
                abs(math.log(new / old)) < _SMALLEST_CHANGE
                for stage, factor in made.items()
                for new, old in zip(factor, before[stage], strict=True)
            )
        ):
            return False
        self.corrections = Corrections(made, dict(self._overheads_us))
        return True

    def _follow_overheads(self) -> bool:
        if self._num_updates < _FEWEST_UPDATES:
            return False
        changed = False
        for name, stated_us in self._overheads_us.items():
            lines = [
                offset
                for (place, _), seen in self._seen.items()
                if self._stages[place].module == name
                and (offset := _offset_per_call(sum(seen, np.zeros(SUMS_SHAPE[1])))) is not None
            ]
            if not lines:
                continue
            found_us = median(lines)
            if abs(found_us - stated_us) > _SMALLEST_OVERHEAD_CHANGE * max(found_us, stated_us):
                self._overheads_us[name] = found_us
                changed = True
        return changed

    def _log(self, place: int, phase: int) -> float:
        module = self._stages[place].module
        peers = [
            median(self._logs(other, seen))
            for (other, other_phase), seen in self._seen.items()
            if other_phase == phase and self._stages[other].module == module
        ]
        if not peers:
            return 0.0
        middle, limit = median(peers), math.log(_LARGEST_SPREAD)
        seen = self._seen.get((place, phase))
        own = median(self._logs(place, seen)) if seen else middle
        near = min(max(own, middle - limit), middle + limit)
        # What a problem may say: costs that are further off must not end training.
        return min(max(near, -_LARGEST_LOG), _LARGEST_LOG)

    def _logs(self, place: int, seen: Iterable[FloatArray]) -> list[float]:
        """Per iteration the logarithm of measured over stated time, at the overhead of now."""
        overhead_us = self._overheads_us[self._stages[place].module]
        return [
            math.log(sums[_MEASURED] / (sums[_WORK] + overhead_us * sums[_CALLS]))
            for sums in seen
            if sums[_WORK] + overhead_us * sums[_CALLS] > 0.0
        ] or [0.0]


def _offset_per_call(sums: FloatArray) -> float | None:
    """The overhead of calling a layer, in the unit of stated work; None where no line can tell.

    Least squares of measured time over work, with a slope between ``_LEAST_SLOPE`` of the mean
    ratio and all of it: the offset is neither below zero nor everything.
    """
    count, x, y = sums[_COUNT], sums[_X], sums[_Y]
    if count < _FEWEST_ACTIONS or x <= 0.0 or y <= 0.0:
        return None
    variance = sums[_XX] / count - (x / count) ** 2
    if variance < (_LEAST_VARIATION * x / count) ** 2:
        return None
    ratio = y / x
    slope = (sums[_XY] / count - x * y / count**2) / variance
    slope = min(max(slope, _LEAST_SLOPE * ratio), ratio)
    calls = sums[_CALLS] / count
    return float((y - slope * x) / count / (slope * calls))
