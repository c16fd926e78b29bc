"""Anytime planning of one batch: a quick plan first, then better ones, until a limit.

A search is asked for a number of evaluations, so that the same batch gives the same plan on every
machine.  Only where that many do not fit into the time there is, the last round searches for as
long as is left, and its plan says that it was cut short.  Not modelled: a single evaluation cannot
be interrupted, so the limit is kept up to the time of the smallest round.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_dip.partition import Partition
from megatron_dip.plan import Plan, QueueModel
from megatron_dip.planner.joint import restrict_plan
from megatron_dip.planner.planner import Algorithm, make_plan
from megatron_dip.workload import Problem

__all__ = ["PlannerSettings", "RoundPlan", "plan_in_rounds"]

logger = logging.getLogger(__name__)

_FIRST_ROUND_EVALUATIONS = 64
# All rounds but the last together then cost a seventh of it.
_GROWTH = 8
_VARIED_PARTS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class PlannerSettings:
    """How the batches of a run are planned."""

    algorithm: Algorithm
    evaluations: int
    """Orders that the dual queue tries for a batch; 0 takes its default."""
    split_backward: bool = False
    """Input and weight gradients apart, so that the latter can fill gaps."""
    fixed: Plan | None = None
    """One plan of a joint problem, of which every batch runs what it has; then none is made."""
    queues: QueueModel | None = None
    """The hardware queues of the ranks that run the plans; see :class:`QueueModel`."""
    searches: int = 1
    """Of a batch at the same time; they divide the evaluations, see
    :func:`megatron_dip.planner.search.search_schedule`."""
    varied: tuple[str, ...] = ()
    """Modules whose microbatches are split, each in another way than the one before, so that what
    is measured differs in size."""

    @property
    def num_evaluations(self) -> int:
        """Orders that are tried after the first plan."""
        searches = self.fixed is None and self.algorithm == "dual_queue"
        return self.evaluations if searches else 0

    def first_plan(self, problem: Problem, partition: Partition) -> Plan:
        """The plan without a search."""
        if self.fixed is not None:
            return restrict_plan(self.fixed, problem)
        return self._plan(problem, partition)

    def search(
        self,
        problem: Problem,
        partition: Partition,
        *,
        evaluations: int | None = None,
        budget_ms: float | None = None,
    ) -> Plan:
        """The plan that a search with one of the two budgets finds."""
        return self._plan(problem, partition, evaluations=evaluations, budget_ms=budget_ms)

    def fallback(self, problem: Problem, partition: Partition) -> Plan:
        """The plan without a search, or 1F1B where the planner fails at that."""
        try:
            return self.first_plan(problem, partition)
        # A mistake in the planner must not end training while there is another plan.
        except Exception as error:
            logger.warning("no plan but 1F1B's: %s: %s", type(error).__name__, error)
            return make_plan(problem, partition, algorithm="one_f_one_b", queues=self.queues)

    def _plan(self, problem: Problem, partition: Partition, **budget: Any) -> Plan:
        return make_plan(
            problem,
            partition,
            algorithm=self.algorithm,
            max_tokens=self._varied_limits(problem),
            split_backward=self.split_backward,
            # The batch is there and must be trained: one rank may run out of memory, none waits.
            when_infeasible="least_memory",
            queues=self.queues,
            workers=self.searches,
            **budget,
        )

    def _varied_limits(self, problem: Problem) -> dict[str, tuple[int, ...]]:
        """Of the first microbatch whole, of the next ones in parts, and so on."""
        limits = {}
        for name in self.varied:
            held = [
                max(1, sum(item.tokens for item in problem.items(name, number)))
                for number in range(problem.num_microbatches)
            ]
            limits[name] = tuple(
                math.ceil(tokens / _VARIED_PARTS[number % len(_VARIED_PARTS)])
                for number, tokens in enumerate(held)
            )
        return limits


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """A plan that is better than those before it, or the last word."""

    plan: Plan
    is_last: bool
    is_searched: bool
    """Whether all evaluations that were asked for are behind it, or none can find a better one."""


def plan_in_rounds(
    problem: Problem, partition: Partition, settings: PlannerSettings, limit_ms: float
) -> Iterator[RoundPlan]:
    """Plans of one batch, each better than the one before; the last one is marked.

    Args:
        problem: The batch.
        partition: Where every module's layers are.
        settings: What is asked for.
        limit_ms: Of the search that follows the first plan.

    Raises:
        DipError: As :func:`megatron_dip.planner.make_plan`.
    """
    evaluations = settings.num_evaluations
    best = settings.first_plan(problem, partition)
    is_searched = not evaluations or _is_optimal(best)
    yield RoundPlan(plan=best, is_last=is_searched, is_searched=is_searched)
    if is_searched:
        return
    # Not before: the first plan of a process also waits for compiled code.
    started = time.monotonic()
    count = min(_FIRST_ROUND_EVALUATIONS, evaluations)
    expected_ms = 0.0
    while expected_ms < (left_ms := limit_ms - (time.monotonic() - started) * 1000):
        round_started = time.monotonic()
        best = _better(best, settings.search(problem, partition, evaluations=count))
        is_searched = count == evaluations or _is_optimal(best)
        yield RoundPlan(plan=best, is_last=is_searched, is_searched=is_searched)
        if is_searched:
            return
        following = min(_GROWTH * count, evaluations)
        expected_ms = (time.monotonic() - round_started) * 1000 * following / count
        count = following
    if left_ms > 0:
        best = _better(best, settings.search(problem, partition, budget_ms=left_ms))
    yield RoundPlan(plan=best, is_last=True, is_searched=_is_optimal(best))


def _is_optimal(plan: Plan) -> bool:
    assert plan.estimate is not None
    return plan.estimate.makespan_us <= plan.estimate.lower_bound_us


def _better(one: Plan, other: Plan) -> Plan:
    """The faster of two plans; the first where they are equal, so that ties do not matter."""
    assert one.estimate is not None and other.estimate is not None
    return other if other.estimate.makespan_us < one.estimate.makespan_us else one
