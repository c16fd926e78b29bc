"""From a batch problem to a plan: form sub-microbatches, order, lower, estimate, validate."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.plan.lowering import lower_lists
from megatron_dip.plan.placing import place_receives
from megatron_dip.plan.plan import Estimate, Offload, Plan, Recompute
from megatron_dip.plan.queues import QueueModel
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner.evaluator import Budget, as_schedule
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.memory import (
    MemoryFitter,
    layers_to_offload,
    layers_to_recompute,
)
from megatron_dip.planner.one_f_one_b import order_one_f_one_b
from megatron_dip.planner.search import Search, check_workers, schedule_by_default, search_schedule
from megatron_dip.planner.sub_microbatches import TokenLimit, form_sub_microbatches
from megatron_dip.simulator.bounds import lower_bound_us
from megatron_dip.simulator.simulate import (
    ComputeOrder,
    Simulation,
    list_durations_us,
    simulate_order,
    simulate_queues,
)
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.workload import Problem

__all__ = [
    "Algorithm",
    "Search",
    "WhenInfeasible",
    "estimate_simulation",
    "make_plan",
    "plan_from_order",
    "simulate_schedule",
]

logger = logging.getLogger(__name__)

Algorithm = Literal["dual_queue", "one_f_one_b"]

WhenInfeasible = Literal["raise", "least_memory"]
"""Where no plan keeps the memory limit: raise, or plan with as much more as is needed and warn."""


def make_plan(
    problem: Problem,
    partition: Partition,
    *,
    algorithm: Algorithm = "dual_queue",
    max_tokens: Mapping[str, TokenLimit] | None = None,
    split_backward: bool = False,
    search: Search = "local",
    evaluations: int | None = None,
    budget_ms: float | None = None,
    seed: int = 0,
    memory_program: bool = True,
    workers: int = 1,
    when_infeasible: WhenInfeasible = "raise",
    queues: QueueModel | None = None,
) -> Plan:
    """Plan one batch.

    The dual queue keeps the memory limit, by offloading layers where the problem has a
    ``host_link``, by recomputing layers and by holding works back.  Its
    plan is replaced by 1F1B's on the same sub-microbatches where that is faster and keeps the
    limit too, with what of it must be recomputed or offloaded.

    Args:
        problem: The batch.
        partition: Where every module's layers are.
        algorithm: How compute actions are ordered.
        max_tokens: Per module, the size of a sub-microbatch, instead of the partition's, or one
            for every microbatch; not split where it is None.
        split_backward: Input and weight gradients apart, so that the latter can fill gaps.
        search: How the dual queue's priorities are searched; see :func:`search_schedule`.
        evaluations: How many schedules the search may make; or
        budget_ms: how long it may take.  Without either the default priority is taken.
        seed: Of the search.
        memory_program: Whether layers may be recomputed, and offloaded.
        workers: Searches at the same time.
        when_infeasible: What to do where the dual queue finds nothing that keeps the limit.
        queues: The hardware queues that the plan is for; one of its own for every stream if None.

    Raises:
        ConfigError: The budget is not above zero, there are two, 1F1B is to be searched, or there
            is no worker.
        InfeasibleError: A microbatch does not fit into the memory of a rank, with
            ``memory_program`` not even if all of its layers are recomputed.
        PartitionError: The partition does not cover the modules.
        PlanError: ``max_tokens`` is wrong.
    """
    check_workers(workers)
    has_budget = evaluations is not None or budget_ms is not None
    if has_budget:
        _check_budget(algorithm, Budget(evaluations, budget_ms))
    sizes: dict[str, TokenLimit] = {**partition.sub_microbatch_tokens, **(max_tokens or {})}
    subs = form_sub_microbatches(problem, sizes)
    table = build_task_table(PipelineGraph(problem, partition, subs))
    if algorithm == "one_f_one_b":
        return _finish(_one_f_one_b(table, split_backward), queues)

    how: dict[str, Any] = {
        "split_backward": split_backward,
        "memory_program": memory_program,
        "one_queue": queues is not None,
    }
    schedule = partial(schedule_by_default, **how)
    if has_budget:
        schedule = partial(
            search_schedule,
            search=search,
            evaluations=evaluations,
            budget_ms=budget_ms,
            seed=seed,
            workers=workers,
            **how,
        )
    limited, found = _within_limits(table, schedule, when_infeasible, memory_program)
    found = _faster(limited, found, **how)
    return _finish(simulate_schedule(table, found), queues)


def simulate_schedule(table: TaskTable, found: GreedySchedule) -> Simulation:
    """Simulate a schedule of the batch of ``table`` with what it recomputes and offloads."""
    table = table.with_recompute(found.num_recomputed)
    if found.loans is None:
        return simulate_order(table, found.order)
    return simulate_order(table.with_offload(found.loans.num_layers), found.loans.order)


def _check_budget(algorithm: Algorithm, budget: Budget) -> None:
    budget.check()
    if algorithm == "one_f_one_b":
        raise ConfigError(
            "a search budget was given for 1F1B, which has nothing to search (leave it out, or "
            "plan with dual_queue)"
        )


def _within_limits(
    table: TaskTable,
    schedule: Callable[[TaskTable], GreedySchedule],
    when_infeasible: WhenInfeasible,
    memory_program: bool,
) -> tuple[TaskTable, GreedySchedule]:
    """The schedule, and the batch with the limits that it keeps."""
    try:
        return table, schedule(table)
    except InfeasibleError as error:
        if when_infeasible == "raise":
            raise
        logger.warning("no plan keeps the memory limit, taking one that needs least: %s", error)
    limited = _with_least_limits(table, memory_program)
    return limited, schedule(limited)


def _one_f_one_b(table: TaskTable, split_backward: bool) -> Simulation:
    simulation = simulate_order(table, order_one_f_one_b(table, split_backward=split_backward))
    limits = table.graph.problem.memory_limit_bytes
    if any(peak > limit for peak, limit in zip(simulation.peak_bytes, limits, strict=True)):
        logger.warning(
            "1F1B needs %s bytes per rank (limits %s): it does not look at memory, the dual queue "
            "does",
            list(simulation.peak_bytes),
            list(limits),
        )
    return simulation


def _faster(
    table: TaskTable,
    found: GreedySchedule,
    *,
    split_backward: bool,
    memory_program: bool,
    one_queue: bool,
) -> GreedySchedule:
    """``found``, or 1F1B where that is faster and keeps the limit."""
    order = order_one_f_one_b(table, split_backward=split_backward)
    fitter = MemoryFitter(table, split_backward=split_backward, one_queue=one_queue)
    bare = fitter.run(order, np.zeros(table.num_works, dtype=np.int64))
    fit = fitter.fit_and_run(order, bare.starts_us)
    if fit is None or fit.times.makespan_us >= found.makespan_us:
        return found
    if not memory_program and (fit.num_recomputed.any() or fit.num_offloaded.any()):
        return found
    return as_schedule(order, fit)


def _with_least_limits(table: TaskTable, memory_program: bool) -> TaskTable:
    """The same batch with limits under which its largest microbatch just fits."""
    graph = table.graph
    least = MemoryFitter(table, split_backward=False).least_bytes(memory_program)
    limits = np.maximum(least, graph.problem.memory_limit_bytes).tolist()
    problem = graph.problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    return build_task_table(PipelineGraph(problem, graph.partition, graph.sub_microbatches))


def plan_from_order(
    graph: PipelineGraph,
    compute_order: ComputeOrder,
    recompute: Sequence[Recompute] = (),
    queues: QueueModel | None = None,
    offload: Sequence[Offload] = (),
) -> Plan:
    """The validated plan that computes and copies in ``compute_order``, e.g. one written by hand.

    Raises:
        PlanError: The order is not a correct schedule of the batch.
    """
    recomputed, offloaded = (
        {Work(one.stage, one.microbatch, one.sub): one.layers for one in entries}
        for entries in (recompute, offload)
    )
    table = build_task_table(graph, recomputed, offloaded)
    return _finish(simulate_order(table, compute_order), queues, recompute, offload)


def _finish(
    simulation: Simulation,
    queues: QueueModel | None,
    recompute: Sequence[Recompute] | None = None,
    offload: Sequence[Offload] | None = None,
) -> Plan:
    """The plan of a simulated order; of works with layers recomputed or offloaded those that
    planning chooses where none are named."""
    table = simulation.table
    if recompute is None:
        recompute = layers_to_recompute(table, table.num_recomputed)
    if offload is None:
        offload = layers_to_offload(table, table.num_offloaded)
    lowered = lower_lists(table.graph, simulation.completion_order, simulation.order.task)
    if queues is not None:
        durations_us = list_durations_us(table, lowered.lists)
        lowered = lowered.arranged(
            place_receives(table.graph.wiring, lowered.lists, durations_us, queues.communicators)
        )
        simulation = simulate_queues(table, lowered.lists, queues)
    plan = Plan.of_graph(
        table.graph,
        lowered.ranks(),
        recompute=tuple(recompute),
        offload=tuple(offload),
        estimate=estimate_simulation(simulation),
        queues=queues,
    )
    validate_plan(plan)
    return plan


def estimate_simulation(simulation: Simulation) -> Estimate:
    """What a plan says of itself."""
    table = simulation.table
    # The bound is one for every schedule, so it knows no recomputation.
    bare = table.with_recompute(np.zeros_like(table.num_recomputed))
    return simulation.estimate(lower_bound_us(bare, split_backward=simulation.has_split_backward))
