"""Times of layers from what the actions of a run took, by least squares.

What an action takes is a sum of terms that its plan knows: calls of layers, tokens and pairs of
tokens times layers, tokens in what sits before the first or after the last layer.  The factor of
each term is fitted per module, forward and backward apart, to the actions of all its stages: to
relative errors, because short actions count as much as long ones, and with less weight on actions
that others held up.

Terms that the sizes of a run cannot tell apart (a module of one stage always does its head with its
layers) are kept near the proportions that the plan's own costs state; what calling a layer takes is
kept near nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatron_dip.costs.profile import EndRates, FittedTimes, Rates
from megatron_dip.costs.work import work_costs
from megatron_dip.errors import DataError
from megatron_dip.plan import ActionType, Plan
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.plan.wiring import BoolArray, FloatArray
from megatron_dip.report.traces import IterationTrace
from megatron_dip.simulator.measured import action_durations_us
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import Item, Problem

__all__ = ["FittedModule", "fit_times", "restated"]

_TERMS = ("calls", "tokens", "pairs", "first", "last")
_CALLS, _TOKENS, _PAIRS, _FIRST, _LAST = range(len(_TERMS))
# Columns: the terms of forwards, then those of backwards; calls take equally long in both.
_NUM_COLUMNS = 2 * len(_TERMS)
_STRENGTH = 0.02
"""Of what the costs state, against the actions: where those say something they decide."""
_LEAST_END = 0.01
"""Of a layer's time per token that an end of a module is begun with, if stated to take none."""
_ROUNDS = 8


class FittedModule(NamedTuple):
    """What was found for one module."""

    times: FittedTimes
    error: float
    """Median part by which the fit is off, over the module's actions."""
    num_actions: int


class _Actions(NamedTuple):
    """Compute actions of one module: [A, columns] terms, [A] times."""

    terms: FloatArray
    measured_us: FloatArray
    is_forward: BoolArray


def fit_times(
    iterations: Iterable[tuple[IterationTrace, Plan]],
) -> dict[str, FittedModule]:
    """Per module, what its work took in recorded steps of one run.

    Args:
        iterations: Traces of plans, each with the plan that was run; not those that warmed up.

    Raises:
        DataError: There are none, or an earlier version wrote them.
    """
    runs = list(iterations)
    if not runs:
        raise DataError("no recorded step has a plan (expected some beside the first of the run)")
    found: dict[str, list[tuple[FloatArray, float, bool]]] = {}
    for trace, plan in runs:
        _collect(trace, plan, found)
    fitted = {}
    for name, rows in found.items():
        terms, times, forwards = zip(*rows, strict=True)
        actions = _Actions(np.stack(terms), np.array(times), np.array(forwards))
        items = [
            item
            for _, plan in runs
            for number in range(plan.problem.num_microbatches)
            for item in plan.problem.items(name, number)
        ]
        fitted[name] = _fit(actions, _stated(items))
    return fitted


def _collect(
    trace: IterationTrace, plan: Plan, found: dict[str, list[tuple[FloatArray, float, bool]]]
) -> None:
    """Add the compute actions of one iteration, by module."""
    table = build_task_table(plan.graph, plan.recomputed_layers)
    columns = [work_costs(_graph_of(plan, term)) for term in range(len(_TERMS))]
    for rank in trace.ranks:
        for action, measured_us in action_durations_us(rank.spans):
            if measured_us <= 0.0 or action.microbatch is None:
                continue
            number = plan.graph.numbers[Work(action.stage, action.microbatch, action.sub)]
            again = int(table.num_recomputed[number])
            row = np.zeros((2, len(_TERMS)))
            is_forward = action.type is ActionType.FORWARD
            for term, costs in enumerate(columns):
                if is_forward:
                    row[0, term] = costs.forward_us[number]
                    continue
                row[0, term] = again * costs.recompute_layer_us[number]
                if action.type is not ActionType.WEIGHT_GRAD:
                    row[1, term] += costs.input_grad_us[number]
                if action.type is not ActionType.INPUT_GRAD:
                    row[1, term] += costs.weight_grad_us[number]
            row[0, _CALLS] += row[1, _CALLS]
            row[1, _CALLS] = 0.0
            module = plan.partition[action.stage].module
            found.setdefault(module, []).append((row.ravel(), measured_us, is_forward))


def _graph_of(plan: Plan, term: int) -> PipelineGraph:
    """Of the plan's batch if its work consisted of one term alone, in units of that term."""
    problem = plan.problem
    modules = tuple(
        module.model_copy(update={"layer_overhead_us": float(term == _CALLS)})
        for module in problem.modules
    )
    microbatches = tuple(
        {name: tuple(_item_of(item, term) for item in items) for name, items in batch.items()}
        for batch in problem.microbatches
    )
    changed = problem.model_copy(
        update={"modules": modules, "microbatches": microbatches, "stage_factors": None}
    )
    return PipelineGraph(changed, plan.partition, plan.sub_microbatches)


def _item_of(item: Item, term: int) -> Item:
    if item.token_pairs is None:
        raise DataError(
            "the plans of this run do not say which tokens attend to each other: an earlier "
            "version wrote them (run again)"
        )
    tokens = item.tokens if term == _TOKENS else 0.0
    pairs = item.token_pairs if term == _PAIRS else 0.0
    values = {
        "forward_us": float(tokens + pairs),
        "input_grad_us": float(tokens + pairs),
        "weight_grad_us": float(tokens),
        "recompute_us": None,
    }
    for end, wanted in (("first", term == _FIRST), ("last", term == _LAST)):
        for phase in ("forward", "input_grad", "weight_grad"):
            name = f"{end}_extra_{phase}_us"
            has_it = wanted and (phase == "forward" or getattr(item, name) > 0.0)
            values[name] = float(item.tokens) if has_it else 0.0
    return item.model_copy(update=values)


def _stated(items: Sequence[Item]) -> FloatArray:
    """[columns]: the factors by which the plans' own costs came about."""
    tokens, pairs = (
        np.array([getattr(item, name) for item in items], np.float64)
        for name in ("tokens", "token_pairs")
    )
    total = max(1.0, float(tokens.sum()))

    def times(name: str) -> FloatArray:
        return np.array([getattr(item, name) for item in items], np.float64)

    input_grad, weight_grad = times("input_grad_us"), times("weight_grad_us")
    stated = np.zeros((2, len(_TERMS)))
    for phase, us, factor in (
        (0, times("forward_us"), 1.0),
        (1, input_grad + weight_grad, 1.0 * (input_grad > 0.0) + (weight_grad > 0.0)),
    ):
        columns = np.stack([factor * tokens, pairs], axis=1)
        stated[phase, [_TOKENS, _PAIRS]] = _nonnegative(columns, us)
        for term, end in ((_FIRST, "first"), (_LAST, "last")):
            names = ("forward",) if phase == 0 else ("input_grad", "weight_grad")
            parts = [float(times(f"{end}_extra_{name}_us").sum()) for name in names]
            given = sum(parts) / total / max(1, sum(part > 0.0 for part in parts))
            stated[phase, term] = max(given, _LEAST_END * stated[phase, _TOKENS])
    return stated.ravel()


def _fit(actions: _Actions, stated: FloatArray) -> FittedModule:
    terms, measured = actions.terms, actions.measured_us
    start = stated.copy()
    for phase, rows in enumerate((actions.is_forward, ~actions.is_forward)):
        part = slice(phase * len(_TERMS), (phase + 1) * len(_TERMS))
        said = float((terms[rows][:, part] @ stated[part]).sum())
        if said > 0.0:
            start[part] *= measured[rows].sum() / said
    # Of calls: as if an action were nothing else.
    calls = terms[:, _CALLS]
    start[_CALLS] = float(np.median(measured[calls > 0] / calls[calls > 0])) if calls.any() else 0.0
    near = np.ones(_NUM_COLUMNS)
    near[_CALLS] = 0.0
    weights = np.ones(len(measured))
    strength = _STRENGTH * np.sqrt(len(measured))
    columns = terms * start / measured[:, None]
    for _ in range(_ROUNDS):
        found = _nonnegative(
            np.concatenate([columns * weights[:, None], strength * np.eye(_NUM_COLUMNS)]),
            np.concatenate([weights, strength * near]),
        )
        errors = np.abs(columns @ found - 1.0)
        typical = 2.0 * float(np.median(errors)) + 1e-12
        weights = np.sqrt(typical / np.maximum(errors, typical))
    return FittedModule(
        _as_times(found * start, has_backward=not actions.is_forward.all()),
        float(np.median(errors)),
        len(measured),
    )


def _nonnegative(columns: FloatArray, values: FloatArray) -> FloatArray:
    """Least squares with nothing below zero: what would be is left out, one after another."""
    found = np.zeros(columns.shape[1])
    scale = np.linalg.norm(columns, axis=0)
    kept = scale > 0.0
    while kept.any():
        part = np.linalg.lstsq(columns[:, kept] / scale[kept], values, rcond=None)[0]
        if part.min() >= 0.0:
            found[kept] = part / scale[kept]
            break
        kept[np.flatnonzero(kept)[part.argmin()]] = False
    return found


def _as_times(found: FloatArray, *, has_backward: bool) -> FittedTimes:
    forward, backward = found.reshape(2, len(_TERMS))
    if not has_backward:
        # A module that was only used: as often as much as a forward, as operations are.
        backward = forward.copy()
        backward[_PAIRS] *= 2.0
    return FittedTimes(
        overhead_us=forward[_CALLS],
        forward=Rates(token_us=forward[_TOKENS], pair_us=forward[_PAIRS]),
        backward=Rates(token_us=backward[_TOKENS], pair_us=backward[_PAIRS]),
        first_extra=EndRates(forward_us=forward[_FIRST], backward_us=backward[_FIRST]),
        last_extra=EndRates(forward_us=forward[_LAST], backward_us=backward[_LAST]),
    )


def restated(problem: Problem, fitted: Mapping[str, FittedModule]) -> Problem:
    """``problem`` at fitted times, whatever the stages that it was run on."""
    times = {name: module.times for name, module in fitted.items()}
    modules = tuple(
        module.model_copy(update={"layer_overhead_us": times[module.name].overhead_us})
        if module.name in times
        else module
        for module in problem.modules
    )
    microbatches = tuple(
        {
            name: tuple(_at(times[name], item) if name in times else item for item in items)
            for name, items in batch.items()
        }
        for batch in problem.microbatches
    )
    changed = {"modules": modules, "microbatches": microbatches, "stage_factors": None}
    return problem.model_copy(update=changed)


def _at(times: FittedTimes, item: Item) -> Item:
    """``item`` at ``times``; a phase that it has no part in stays so."""
    tokens, pairs = item.tokens, item.token_pairs or 0
    backward_us = tokens * times.backward.token_us
    values = {
        "input_grad_us": backward_us + pairs * times.backward.pair_us,
        "weight_grad_us": backward_us,
    }
    for end, rates in (("first", times.first_extra), ("last", times.last_extra)):
        values[f"{end}_extra_input_grad_us"] = tokens * rates.backward_us
        values[f"{end}_extra_weight_grad_us"] = tokens * rates.backward_us
    values = {name: us for name, us in values.items() if getattr(item, name) > 0.0}
    return item.model_copy(
        update={
            "forward_us": tokens * times.forward.token_us + pairs * times.forward.pair_us,
            "recompute_us": None,
            "first_extra_forward_us": tokens * times.first_extra.forward_us,
            "last_extra_forward_us": tokens * times.last_extra.forward_us,
            **values,
        }
    )
