"""Anytime search for the order of a batch: the best schedule that a budget allows.

With a budget in evaluations the result depends on the batch, the seed and the number of workers
alone; with one in milliseconds also on the machine.  A search may stop early, where the lower bound
is reached.

Several workers share one local search: they pause after the same parts of the budget, and all go on
from the best schedule of any.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from megatron_dip.errors import ConfigError
from megatron_dip.limits import MOST_WORKERS
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.local_search import STARTS_SHARE, LocalSearch
from megatron_dip.planner.mcts import search_tree
from megatron_dip.planner.memory import MemoryFitter
from megatron_dip.planner.memory_program import num_program_rows, solve_memory_program
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.simulator.bounds import lower_bound_us
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Search", "check_workers", "schedule_by_default", "search_schedule"]

Search = Literal["local", "mcts"]

# What solving the memory program takes: milliseconds by rows squared (measured: 20 to 30 ms for
# 2,000 to 4,000 rows, 2 to 4 s for 30,000), or evaluations, whose time grows with rows, by rows.
_PROGRAM_MS = 4e-6
_PROGRAM_EVALUATIONS = 0.03
# The part of a budget that it may take.
_PROGRAM_SHARE = 0.4
# When workers go on from the best of them, as parts of the budget.
_EXCHANGES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Of two searches of one worker, how often they take turns once the first one has tried its rules,
# and the part of a turn of the one that holds works back; it is given up after the first turn if it
# is slower by more than this.
_TURNS = 6
_HOLDING_BACK = 0.4
_PROMISING = 1.1
# Between the seeds of workers.
_SEED_STEP = 1_000_003


def check_workers(workers: int) -> None:
    """Raise ConfigError unless there is a worker, and not too many."""
    if workers < 1:
        raise ConfigError(f"{workers} workers (expected 1 or more)")
    if workers > MOST_WORKERS:
        raise ConfigError(f"{workers} workers (expected at most {MOST_WORKERS:,})")


def search_schedule(
    table: TaskTable,
    *,
    search: Search = "local",
    evaluations: int | None = None,
    budget_ms: float | None = None,
    seed: int = 0,
    split_backward: bool = False,
    memory_program: bool = True,
    workers: int = 1,
    one_queue: bool = False,
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
        memory_program: Offload and recompute layers where not everything fits at once; else works
            are held back, which takes longer.
        workers: Searches at the same time, in threads, each with its own random numbers and its
            share of the evaluations; local ones go on from the best of all now and then.
        one_queue: Whether it is for ranks with one hardware queue.

    Raises:
        ConfigError: Not exactly one budget is given, it is not above zero, or there is no worker.
        InfeasibleError: A single microbatch does not fit into the memory of a rank, with
            ``memory_program`` not even if all of its layers are recomputed.
    """
    Budget(evaluations, budget_ms).check()
    check_workers(workers)
    if not table.graph.sub_microbatches:
        # Nothing in any microbatch: there is no order to search.
        return schedule_by_default(
            table,
            split_backward=split_backward,
            memory_program=memory_program,
            one_queue=one_queue,
        )
    started = time.monotonic()
    share = _program_share(table, split_backward, evaluations, budget_ms) if memory_program else 0.0
    goal_us = lower_bound_us(table, split_backward=split_backward)

    def make_evaluator(index: int) -> Evaluator:
        left = None if evaluations is None else round(evaluations * (1 - share))
        spent_ms = (time.monotonic() - started) * 1000
        return Evaluator(
            table,
            Budget(
                None if left is None else max(1, left // workers + (index < left % workers)),
                None if budget_ms is None else max(budget_ms * (1 - share) - spent_ms, 1e-3),
            ),
            split_backward=split_backward,
            goal_us=goal_us,
            can_recompute=memory_program,
            one_queue=one_queue,
        )

    found = [make_evaluator(index) for index in range(workers)]
    seeds = [seed + index * _SEED_STEP for index in range(workers)]
    if search == "mcts":
        _at_once(search_tree, found, seeds)
    else:
        _search_together(found, seeds)
    best = min((evaluator.best for evaluator in found if evaluator.best is not None), key=_time)
    fitter = found[0].fitter
    if share == 0.0 or fitter is None or not best.num_recomputed.any():
        return best
    left_ms = None if budget_ms is None else budget_ms - (time.monotonic() - started) * 1000
    return _solve_memory(fitter, best, left_ms)


def _search_together(evaluators: Sequence[Evaluator], seeds: Sequence[int]) -> None:
    """Local searches that go on from the best of them after the same parts of the budget."""
    if len(evaluators) == 1:
        _search_alone(evaluators[0], seeds[0])
        return

    def begin(evaluator: Evaluator, part: int) -> LocalSearch:
        make = partial(LocalSearch, evaluator, seeds[part], part=part, num_parts=len(evaluators))
        search = make()
        return make(holds_back=True) if part % 2 and search.can_hold_back else search

    for evaluator in evaluators:
        evaluator.allow(_EXCHANGES[0])
    searches = _at_once(begin, evaluators, range(len(evaluators)))
    for share in _EXCHANGES:
        for evaluator in evaluators:
            evaluator.allow(share)
        _at_once(LocalSearch.run, searches)
        # The first of equals, so that the result does not depend on who was faster.
        best = min(searches, key=lambda one: one.makespan_us)
        if any(evaluator.has_reached_goal for evaluator in evaluators):
            return
        for one in searches:
            one.go_on_from(best)


def _search_alone(evaluator: Evaluator, seed: int) -> None:
    """One local search; where memory is short two that take turns, one of which waits for memory
    instead of recomputing: each by itself may come to where it finds nothing more."""
    search = LocalSearch(evaluator, seed)
    if not search.can_hold_back:
        search.run()
        return
    evaluator.allow(STARTS_SHARE)
    search.run()
    other = LocalSearch(evaluator, seed + 1, holds_back=True)
    other.take_starts_of(search)
    share = (1.0 - STARTS_SHARE) / _TURNS
    for turn in range(_TURNS):
        begin = STARTS_SHARE + turn * share
        evaluator.allow(begin + (1 - _HOLDING_BACK) * share)
        search.run()
        evaluator.allow(begin + share)
        other.run()
        if turn == 0 and other.makespan_us > _PROMISING * search.makespan_us:
            evaluator.allow(1.0)
            search.run()
            return
        search.go_on_from(other)
        other.go_on_from(search)


def _at_once[Result](function: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
    """Results for all arguments, with a thread each; kernels run without the interpreter's lock."""
    if len(arguments[0]) == 1:
        return [function(*values) for values in zip(*arguments, strict=True)]
    with ThreadPoolExecutor(len(arguments[0])) as pool:
        return list(pool.map(function, *arguments))


def schedule_by_default(
    table: TaskTable,
    *,
    split_backward: bool = False,
    memory_program: bool = True,
    one_queue: bool = False,
) -> GreedySchedule:
    """The dual queue with its default priority; not everything fitting, the best of a few levels
    of recomputation.

    Raises:
        InfeasibleError: As :func:`search_schedule`.
    """
    # One start at every level is what a search begins with; the budget stands for no search.
    evaluator = Evaluator(
        table,
        Budget(evaluations=1),
        split_backward=split_backward,
        goal_us=0.0,
        can_recompute=memory_program,
        one_queue=one_queue,
    )
    portfolio = Portfolio(table, evaluator.forwards)
    rule, order = next(portfolio.starts())
    for level in range(len(evaluator.levels)):
        evaluator.evaluate(portfolio.point(rule, order)._replace(level=level))
    assert evaluator.best is not None, "there is a level"
    return evaluator.best


def _time(schedule: GreedySchedule) -> float:
    return schedule.makespan_us


def _program_share(
    table: TaskTable, split_backward: bool, evaluations: int | None, budget_ms: float | None
) -> float:
    """The part of the budget that the memory program takes; none where that would be too much."""
    fitter = MemoryFitter(table, split_backward=split_backward)
    # It knows nothing of copies, which leave little to recompute.
    if fitter.fits_at_once or table.graph.problem.host_link is not None:
        return 0.0
    rows = num_program_rows(fitter)
    if evaluations is not None:
        share = rows * _PROGRAM_EVALUATIONS / evaluations
    else:
        share = rows**2 * _PROGRAM_MS / (budget_ms or 1.0)
    return share if share <= _PROGRAM_SHARE else 0.0


def _solve_memory(
    fitter: MemoryFitter, schedule: GreedySchedule, left_ms: float | None
) -> GreedySchedule:
    if left_ms is not None and left_ms <= 0:
        return schedule
    limit_s = None if left_ms is None else left_ms / 1000
    chosen = solve_memory_program(fitter, schedule.order, schedule.num_recomputed, limit_s=limit_s)
    times = fitter.run(schedule.order, chosen)
    if times.makespan_us >= schedule.makespan_us:
        return schedule
    return GreedySchedule(schedule.order, times.starts_us, times.makespan_us, chosen)
