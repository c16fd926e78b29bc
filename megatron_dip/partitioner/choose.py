"""The modality-aware partitioner: segments, cut and sub-microbatch size from sample batches.

DIP (arXiv 2504.14145) cuts every module by itself into segments that span all ranks.  How many, and
where, is decided here by planning sample batches on candidate cuts with the planner that will plan
the real ones.  So whatever a schedule hides costs nothing and whatever it cannot hide counts: head
and embedding, fill and drain, overheads of layers and transfers, memory.

1. *Segments*: every combination of numbers of segments with balanced layers, all passed in one
   direction or there and back, judged on one sample; the best of them go on to all samples.  Left
   out where a cut to begin with is given.
2. *Changes*: from the best, random changes of single layers, of the path through the ranks and of
   the size of sub-microbatches.  A cut that is hardly worse may be the way to a better one: it is
   kept if it is better than the one kept some changes ago (late acceptance; Burke and Bykov, EJOR
   258, 2017).  What is clearly worse on the first samples is not judged on the others.
3. *Finals*: the best of them once more, with many more schedules: luck drops out.

A few batches are little to choose from: cuts are judged on as many more whose microbatches are
drawn from all samples.  The result depends on the samples, the start and the seed alone.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from megatron_dip.errors import ConfigError, DipError, InfeasibleError, PartitionError
from megatron_dip.limits import MOST_EVALUATIONS
from megatron_dip.partition.stages import Partition
from megatron_dip.partitioner.changes import changed
from megatron_dip.partitioner.cuts import Cut, Layers, balanced_layers, there_and_back
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.search import search_schedule
from megatron_dip.planner.sub_microbatches import form_sub_microbatches
from megatron_dip.simulator.bounds import useful_work_us
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import Problem

__all__ = ["ChosenPartition", "Progress", "choose_partition"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many cuts have been judged and how many will be at most."""

_SEGMENT_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
_PARTS = (2, 3, 4, 6, 8, 12, 16)
"""Into how many groups the largest microbatch of a module may be split."""
_NUM_STARTS = 8
_NUM_FINALISTS = 8
_FIRST_EVALUATIONS = 32
_FINAL_EVALUATIONS = 8
"""Times as many as before."""
# How many changes ago the cut was kept that a change must be better than.
_MEMORY = 20
# A cut that is worse by so much on the first sample is given up; by less on the first two, ...
_CLEARLY_WORSE = 0.02


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
    evaluations: int = 64,
    max_changes: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> ChosenPartition:
    """The best cut found for batches like ``problems``, under their memory limits.

    Args:
        problems: Sample batches of one model on one machine.
        start: What to change first; the best even cut where it is None.
        split_backward: Whether the batches will be planned with split backwards.
        evaluations: Schedules that are made to judge a cut on one sample.
        max_changes: Changes that are judged.
        seed: Of the random changes.
        progress: Told about every cut that is judged.

    Raises:
        ConfigError: No problems, or a number below one.
        PartitionError: The problems are of different models or machines, ``start`` is of another
            model, or there are too few layers to give every rank one.
        InfeasibleError: No cut keeps the memory limit; the message is that of the best one.
    """
    most = MOST_EVALUATIONS // _FINAL_EVALUATIONS
    if not 1 <= evaluations <= most or not 0 <= max_changes <= MOST_EVALUATIONS:
        raise ConfigError(
            f"evaluations {evaluations}, max_changes {max_changes} (expected at least 1 and 0, at "
            f"most {most:,} and {MOST_EVALUATIONS:,})"
        )
    _check_alike(problems)
    samples = [*problems, *_mixed(problems)]
    judge = _Judge(samples, evaluations, split_backward, progress)
    if start is None:
        first = min(_best_segments(judge, problems), key=judge)
    else:
        start.check_covers(problems[0])
        start.check_ranks(problems[0].num_ranks)
        first = Cut.of(start)
    finalists = _change(judge, first, max_changes, Random(seed))
    best, cost = _best_of(judge, finalists, evaluations * _FINAL_EVALUATIONS)
    if not math.isfinite(cost):
        raise judge.infeasible
    return ChosenPartition(best.partition(), 1 / cost, judge.num_judged)


class _Judge:
    """Ranks x makespan / useful work on samples: infinite where memory is short."""

    def __init__(
        self,
        problems: Sequence[Problem],
        evaluations: int,
        split_backward: bool,
        progress: Progress | None,
    ) -> None:
        self.problems = problems
        self.num_judged = 0
        self.infeasible: DipError = InfeasibleError("no cut was judged")
        """Why the last cut that was given up for good was."""
        self.step = ""
        self.at_most = 0
        self.evaluations = evaluations
        self._split_backward = split_backward
        self._progress = progress

    def __call__(self, cut: Cut) -> float:
        """The mean over all samples."""
        return statistics.mean(self.costs(cut, self.problems, self.evaluations))

    def costs(
        self,
        cut: Cut,
        problems: Sequence[Problem],
        evaluations: int,
        known: Sequence[float] | None = None,
    ) -> list[float]:
        """Per sample; the last one is infinite where the cut is clearly worse than one that costs
        ``known``, and has not been judged on the others."""
        self.num_judged += 1
        if self._progress is not None:
            self._progress(self.step, self.num_judged, max(self.at_most, self.num_judged))
        partition = cut.partition()
        costs: list[float] = []
        try:
            partition.check_ranks(problems[0].num_ranks)
        except PartitionError as error:
            self.infeasible = error
            return [math.inf]
        for problem in problems:
            try:
                costs.append(self._relative_makespan(problem, partition, evaluations))
            except InfeasibleError as error:
                self.infeasible = error
                return [*costs, math.inf]
            if known is not None:
                margin = 1 + _CLEARLY_WORSE / math.sqrt(len(costs))
                if sum(costs) > margin * sum(known[: len(costs)]):
                    return [*costs, math.inf]
        return costs

    def _relative_makespan(self, problem: Problem, partition: Partition, evaluations: int) -> float:
        groups = form_sub_microbatches(problem, partition.sub_microbatch_tokens)
        table = build_task_table(PipelineGraph(problem, partition, groups))
        schedule = search_schedule(
            table, evaluations=evaluations, split_backward=self._split_backward
        )
        return schedule.makespan_us * problem.num_ranks / useful_work_us(problem)


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
    """As many batches again, their microbatches drawn from those of all; none of a single one."""
    if len(problems) == 1:
        return []
    random = Random(0)
    microbatches = [batch for problem in problems for batch in problem.microbatches]
    return [
        problem.model_copy(
            update={"microbatches": tuple(random.sample(microbatches, problem.num_microbatches))}
        )
        for problem in problems
    ]


def _best_segments(judge: _Judge, problems: Sequence[Problem]) -> list[Cut]:
    """The most promising numbers and directions of segments, on the sample with the median work."""
    names = problems[0].module_order
    options = [_even_layers(problems, name) for name in names]
    judge.step = "segments"
    judge.at_most = math.prod(map(len, options)) + _NUM_STARTS
    by_work = sorted(problems, key=useful_work_us)
    sample = by_work[len(by_work) // 2]
    costs: list[tuple[float, int, Cut]] = []
    for layers in itertools.product(*options):
        cut = Cut(
            layers=dict(zip(names, layers, strict=True)),
            sub_microbatch_tokens=dict.fromkeys(names),
        )
        # Fewer segments win a tie: they send less.
        (cost,) = judge.costs(cut, [sample], _FIRST_EVALUATIONS)
        costs.append((cost, len(costs), cut))
    return [cut for _, _, cut in sorted(costs)[:_NUM_STARTS]]


def _even_layers(problems: Sequence[Problem], module: str) -> list[Layers]:
    most = max(1, problems[0].module(module).num_layers // problems[0].num_ranks)
    found = []
    for count in _SEGMENT_COUNTS:
        if count <= most:
            layers = balanced_layers(problems, module, count)
            found.append(layers)
            if count > 1:
                found.append(there_and_back(layers))
    return found


def _change(judge: _Judge, start: Cut, max_changes: int, random: Random) -> list[Cut]:
    """The best cuts that ``max_changes`` random changes lead to, the best one first."""
    judge.step = "changes"
    judge.at_most = judge.num_judged + 1 + max_changes
    sizes = _sizes(judge.problems)
    current, costs = start, judge.costs(start, judge.problems, judge.evaluations)
    cost = statistics.mean(costs)
    found = {start.name: (cost, start)}
    earlier = [cost] * _MEMORY
    for number in range(max_changes):
        change = changed(current, sizes, random)
        if change.name not in found:
            known = costs if math.isfinite(cost) else None
            new = judge.costs(change, judge.problems, judge.evaluations, known)
            new_cost = statistics.mean(new)
            found[change.name] = (new_cost, change)
            if new_cost <= max(cost, earlier[number % _MEMORY]) and math.isfinite(new_cost):
                current, costs, cost = change, new, new_cost
        earlier[number % _MEMORY] = cost
    best = sorted(found.values(), key=lambda pair: pair[0])
    return [cut for _, cut in best[:_NUM_FINALISTS]]


def _best_of(judge: _Judge, cuts: Sequence[Cut], evaluations: int) -> tuple[Cut, float]:
    """The best of ``cuts`` and what it costs."""
    judge.step = "finals"
    judge.at_most = judge.num_judged + len(cuts)
    costs = [statistics.mean(judge.costs(cut, judge.problems, evaluations)) for cut in cuts]
    best = min(range(len(cuts)), key=costs.__getitem__)
    return cuts[best], costs[best]


def _sizes(problems: Sequence[Problem]) -> dict[str, list[int | None]]:
    """Sizes of sub-microbatches that are worth a try, of modules that can be split."""
    sizes: dict[str, list[int | None]] = {}
    for name in problems[0].module_order:
        shares = [
            [item.tokens for item in problem.items(name, number)]
            for problem in problems
            for number in range(problem.num_microbatches)
        ]
        if max(map(len, shares), default=0) > 1:
            most = max(map(sum, shares))
            sizes[name] = [None, *(math.ceil(most / parts) for parts in _PARTS)]
    return sizes
