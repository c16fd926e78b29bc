"""Anytime search for the order of a batch: the best schedule that a budget allows.

With a budget in evaluations the result depends on the batch and the seed alone; with one in
milliseconds also on the machine.  A search may stop early, where the lower bound is reached.
"""

from typing import Literal

from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.local_search import search_locally
from megatron_dip.planner.mcts import search_tree
from megatron_dip.simulator.bounds import lower_bound_us
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Search", "search_schedule"]

Search = Literal["local", "mcts"]


def search_schedule(
    table: TaskTable,
    *,
    search: Search = "local",
    evaluations: int | None = None,
    budget_ms: float | None = None,
    seed: int = 0,
    split_backward: bool = False,
) -> GreedySchedule:
    """The best schedule found; never worse than the dual queue with its default priority.

    Args:
        table: The batch.
        search: ``local`` (see :mod:`megatron_dip.planner.local_search`) or ``mcts`` (see
            :mod:`megatron_dip.planner.mcts`).
        evaluations: How many schedules may be made; or
        budget_ms: how long to search, after the table is made.
        seed: Of the random numbers.
        split_backward: Input and weight gradients apart.

    Raises:
        ConfigError: Not exactly one budget is given, or it is not above zero.
        InfeasibleError: A single microbatch does not fit into the memory of a rank.
    """
    budget = Budget(evaluations, budget_ms)
    goal_us = lower_bound_us(table, split_backward=split_backward)
    evaluator = Evaluator(table, budget, split_backward=split_backward, goal_us=goal_us)
    run = search_tree if search == "mcts" else search_locally
    run(evaluator, seed)
    assert evaluator.best is not None, "a search evaluates at least one point"
    return evaluator.best
