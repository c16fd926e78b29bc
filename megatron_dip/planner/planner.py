"""From a batch problem to a plan: form sub-microbatches, order, lower, estimate, validate."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.plan.lowering import lower
from megatron_dip.plan.plan import Plan, Recompute
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner.dual_queue import default_priority, order_dual_queue
from megatron_dip.planner.evaluator import Budget
from megatron_dip.planner.one_f_one_b import order_one_f_one_b
from megatron_dip.planner.search import Search, search_schedule
from megatron_dip.planner.sub_microbatches import form_sub_microbatches
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.simulator.bounds import lower_bound_us
from megatron_dip.simulator.simulate import ComputeOrder, Simulation, simulate_order
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.workload import Problem

__all__ = ["Algorithm", "Search", "make_plan", "plan_from_order"]

logger = logging.getLogger(__name__)

Algorithm = Literal["dual_queue", "one_f_one_b"]


def make_plan(
    problem: Problem,
    partition: Partition,
    *,
    algorithm: Algorithm = "dual_queue",
    max_tokens: Mapping[str, int | None] | None = None,
    split_backward: bool = False,
    search: Search = "local",
    evaluations: int | None = None,
    budget_ms: float | None = None,
    seed: int = 0,
) -> Plan:
    """Plan one batch.

    The dual queue keeps the memory limit; its plan is replaced by 1F1B's on the same
    sub-microbatches where that keeps the limit too and is faster.  Where no schedule of the dual
    queue fits, 1F1B is taken with a warning, whatever memory it needs: a late failure on one rank
    is easier to understand than none of the ranks having a plan.

    Args:
        problem: The batch.
        partition: Where every module's layers are.
        algorithm: How compute actions are ordered.
        max_tokens: Per module, the size of a sub-microbatch, instead of the partition's; not split
            where it is None.
        split_backward: Input and weight gradients apart, so that the latter can fill gaps.
        search: How the dual queue's priorities are searched; see :func:`search_schedule`.
        evaluations: How many schedules the search may make; or
        budget_ms: how long it may take.  Without either the default priority is taken.
        seed: Of the search.

    Raises:
        ConfigError: The budget is not above zero, there are two, or 1F1B is to be searched.
        PartitionError: The partition does not cover the modules.
        PlanError: ``max_tokens`` is wrong.
    """
    has_budget = evaluations is not None or budget_ms is not None
    if has_budget:
        Budget(evaluations, budget_ms).check()
        if algorithm == "one_f_one_b":
            raise ConfigError(
                "a search budget was given for 1F1B, which has nothing to search (leave it out, or "
                "plan with dual_queue)"
            )
    sizes = {**partition.sub_microbatch_tokens, **(max_tokens or {})}
    graph = PipelineGraph(problem, partition, form_sub_microbatches(problem, sizes))
    table = build_task_table(graph)
    simulation = simulate_order(table, order_one_f_one_b(table, split_backward=split_backward))

    def order_by_dual_queue() -> TaskOrder:
        if not has_budget:
            return order_dual_queue(table, default_priority(table), split_backward=split_backward)
        return search_schedule(
            table,
            search=search,
            evaluations=evaluations,
            budget_ms=budget_ms,
            seed=seed,
            split_backward=split_backward,
        ).order

    if algorithm == "dual_queue":
        simulation = _dual_queue(table, order_by_dual_queue, simulation)
    elif not _fits(table, simulation):
        logger.warning(
            "1F1B needs %s bytes per rank (limits %s): it does not look at memory, the dual queue "
            "does",
            list(simulation.peak_bytes),
            list(problem.memory_limit_bytes),
        )
    return _finish(simulation, ())


def plan_from_order(
    graph: PipelineGraph, compute_order: ComputeOrder, recompute: Sequence[Recompute] = ()
) -> Plan:
    """The validated plan that computes in ``compute_order``, e.g. one written by hand.

    Raises:
        PlanError: The order is not a correct schedule of the batch.
    """
    layers = {Work(r.stage, r.microbatch, r.sub): r.layers for r in recompute}
    table = build_task_table(graph, layers)
    return _finish(simulate_order(table, compute_order), recompute)


def _dual_queue(
    table: TaskTable,
    make_order: Callable[[], TaskOrder],
    fallback: Simulation,
) -> Simulation:
    try:
        order = make_order()
    except InfeasibleError as error:
        logger.warning("the dual queue finds no schedule, falling back to 1F1B: %s", error)
        return fallback
    simulation = simulate_order(table, order)
    if _fits(table, fallback) and fallback.makespan_us < simulation.makespan_us:
        return fallback
    return simulation


def _fits(table: TaskTable, simulation: Simulation) -> bool:
    limits = table.graph.problem.memory_limit_bytes
    return all(peak <= limit for peak, limit in zip(simulation.peak_bytes, limits, strict=True))


def _finish(simulation: Simulation, recompute: Sequence[Recompute]) -> Plan:
    table, graph = simulation.table, simulation.table.graph
    # The bound is one for every schedule, so it knows no recomputation.
    bare = table.with_recompute(np.zeros_like(table.num_recomputed))
    bound_us = lower_bound_us(bare, split_backward=simulation.has_split_backward)
    plan = Plan.of_graph(
        graph,
        lower(graph, simulation.completion_order),
        recompute=tuple(recompute),
        estimate=simulation.estimate(bound_us),
    )
    validate_plan(plan)
    return plan
