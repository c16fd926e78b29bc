"""The modality-aware partitioner: segments, cut and sub-microbatch size from sample batches.

DIP (arXiv 2504.14145) cuts every module by itself into segments that span all ranks.  How many, and
where, is decided here by planning sample batches on candidate cuts with the planner that will plan
the real ones.  So whatever a schedule hides costs nothing and whatever it cannot hide counts: head
and embedding, fill and drain, overheads of layers and transfers, memory.

1. *Segments*: even cuts, climbed over from neighbour to neighbour on one sample
   (:mod:`megatron_dip.partitioner.even_cuts`); the best of them go on to all samples.  Left out
   where a cut to begin with is given.
2. *Changes*: from the best, random changes of single layers, of the path through the ranks and of
   the size of sub-microbatches.  A cut that is hardly worse may be the way to a better one: it is
   kept if it is better than the one kept some changes ago (late acceptance; Burke and Bykov, EJOR
   258, 2017).  What is clearly worse on the first samples is not judged on the others.
3. *Finals*: the best of them once more, with all of the budget that batches are planned in: luck
   drops out.

A few small batches are little to choose from: cuts are judged on as many more whose microbatches
are drawn from all samples.  The result depends on the samples, the start, the effort and the seed
alone.
"""

import math
import statistics
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from megatron_dip.errors import ConfigError, PartitionError
from megatron_dip.limits import MOST_EVALUATIONS
from megatron_dip.partition.stages import Partition
from megatron_dip.partitioner.changes import changed
from megatron_dip.partitioner.cuts import Cut
from megatron_dip.partitioner.even_cuts import best_even_cut, split_sizes
from megatron_dip.partitioner.judge import Judge, Progress
from megatron_dip.planner.evaluator import Budget
from megatron_dip.workload import Problem

__all__ = ["ChosenPartition", "choose_partition"]

_BUDGET_MS = 1000.0
_NUM_FINALISTS = 8
# The parts of the planning budget that changes are judged with, and finalists at least.
_CHANGE_SHARE = 0.25
_LEAST_FINAL_SHARE = 0.5
# How many changes ago the cut was kept that a change must be better than.
_MEMORY = 20
# The part of the effort after which nothing is changed any more: the rest is for the finals.
_CHANGES_SHARE = 0.7
_MOST_MINUTES = 1e6
_ENOUGH_MICROBATCHES = 100


class ChosenPartition(NamedTuple):
    """What the partitioner found."""

    partition: Partition
    utilisation: float
    """Useful work over ranks times makespan, mean over the samples."""
    num_judged: int
    """Cuts that were planned."""


def choose_partition(
    problems: Sequence[Problem],
    *,
    start: Partition | None = None,
    split_backward: bool = False,
    evaluations: int | None = None,
    budget_ms: float | None = None,
    max_changes: int = 1000,
    minutes: float = 2.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ChosenPartition:
    """The best cut found for batches like ``problems``, under their memory limits.

    Args:
        problems: Sample batches of one model on one machine.
        start: What to change first; the best even cut where it is None.
        split_backward: Whether the batches will be planned with split backwards.
        evaluations: How many schedules planning a batch will make; or
        budget_ms: how long it will take, counted as ``minutes``: the longer, the more actions a
            good cut may have.  A second without either.
        max_changes: Changes that are judged at most.
        minutes: About how long it may take on one core of 2.5 GHz.  Counted in actions that are put
            in order, so that the result is the same on every machine.
        seed: Of the random changes.
        progress: Told about every cut that is judged.

    Raises:
        ConfigError: No problems, or a number out of its range.
        PartitionError: The problems are of different models or machines, ``start`` is of another
            model, or there are too few layers to give every rank one.
        InfeasibleError: No cut keeps the memory limit; the message is that of the best one.
    """
    if evaluations is None and budget_ms is None:
        budget_ms = _BUDGET_MS
    budget = Budget(evaluations, budget_ms)
    budget.check()
    if not 0 <= max_changes <= MOST_EVALUATIONS:
        raise ConfigError(f"max_changes {max_changes} (expected 0 to {MOST_EVALUATIONS:,})")
    if not 0 < minutes <= _MOST_MINUTES:
        raise ConfigError(f"minutes {minutes} (expected above 0, at most {_MOST_MINUTES:,.0f})")
    _check_alike(problems)
    judge = Judge(
        [*problems, *_mixed(problems)],
        budget=budget,
        split_backward=split_backward,
        minutes=minutes,
        progress=progress,
    )
    if start is None:
        first = best_even_cut(judge, problems)
    else:
        start.check_covers(problems[0])
        start.check_ranks(problems[0].num_ranks)
        first = Cut.of(start)
    finalists = _change(judge, first, max_changes, Random(seed))
    best, cost = _best_of(judge, finalists)
    if not math.isfinite(cost):
        raise judge.infeasible
    return ChosenPartition(best.partition(), 1 / cost, judge.num_judged)


def _check_alike(problems: Sequence[Problem]) -> None:
    if not problems:
        raise ConfigError("no sample problems (expected at least one)")
    first = problems[0]
    for number, problem in enumerate(problems):
        same = (problem.modules, problem.num_ranks) == (first.modules, first.num_ranks)
        if not same:
            raise PartitionError(
                f"sample {number} has other modules or ranks than sample 0 (expected batches of "
                f"one model on one machine)"
            )


def _mixed(problems: Sequence[Problem]) -> list[Problem]:
    """As many batches again, their microbatches drawn from those of all.

    None where there is one, or so many microbatches that effort is better spent on other cuts.
    """
    if len(problems) == 1 or sum(p.num_microbatches for p in problems) >= _ENOUGH_MICROBATCHES:
        return []
    random = Random(0)
    microbatches = [batch for problem in problems for batch in problem.microbatches]
    return [
        problem.model_copy(
            update={"microbatches": tuple(random.sample(microbatches, problem.num_microbatches))}
        )
        for problem in problems
    ]


def _change(judge: Judge, start: Cut, max_changes: int, random: Random) -> list[Cut]:
    """The best cuts that ``max_changes`` random changes lead to, the best one first."""
    judge.step = "changes"
    sizes = split_sizes(judge.problems)
    current, costs = start, judge.costs(start, judge.problems, _CHANGE_SHARE)
    cost = statistics.mean(costs)
    found = {start.name: (cost, start)}
    earlier = [cost] * _MEMORY
    for number in range(max_changes):
        if judge.spent_share > _CHANGES_SHARE:
            break
        change = changed(current, sizes, random)
        if change.name not in found:
            known = costs if math.isfinite(cost) else None
            new = judge.costs(change, judge.problems, _CHANGE_SHARE, known)
            new_cost = statistics.mean(new)
            found[change.name] = (new_cost, change)
            if new_cost <= max(cost, earlier[number % _MEMORY]) and math.isfinite(new_cost):
                current, costs, cost = change, new, new_cost
        earlier[number % _MEMORY] = cost
    best = sorted(found.values(), key=lambda pair: pair[0])
    return [cut for _, cut in best[:_NUM_FINALISTS]]


def _best_of(judge: Judge, cuts: Sequence[Cut]) -> tuple[Cut, float]:
    """The best of ``cuts``, which are sorted, and what it costs.

    Judged with all of the planning budget, or half where the effort that is left does not allow for
    half of them; the first one in any case.
    """
    judge.step = "finals"
    left = 1.0 - judge.spent_share
    share = 1.0
    while share > _LEAST_FINAL_SHARE and judge.effort(cuts[0], share) * len(cuts) > 2 * left:
        share /= 2
    found: list[tuple[float, int]] = []
    for number, cut in enumerate(cuts):
        if found and judge.spent_share + judge.effort(cut, share) > 1.0:
            break
        costs = judge.costs(cut, judge.problems, share)
        found.append((statistics.mean(costs), number))
    cost, number = min(found)
    return cuts[number], cost
