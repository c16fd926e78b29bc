"""The modality-aware partitioner: segments, cut and sub-microbatch size from sample batches.

DIP (arXiv 2504.14145) cuts every module by itself into segments that span all ranks.  How many, and
where, is decided here by planning sample batches on candidate cuts with the planner that will plan
the real ones.  So whatever a schedule hides costs nothing and whatever it cannot hide counts: head
and embedding, fill and drain, overheads of layers and transfers, memory.

1. *Segments*: every combination of numbers of segments with balanced layers, judged on one sample;
   the best of them go on to all samples.
2. *Sizes and layers*: from the best, hill climbing on all samples over the size of sub-microbatches
   of each module and over single layers between ranks and between segments.

The result depends on the samples alone.  Not modelled: a planner budget other than the one used
here may favour another cut.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_dip.errors import ConfigError, InfeasibleError, PartitionError
from megatron_dip.partition.cuts import Cut, balanced_layers, neighbours
from megatron_dip.partition.stages import Partition
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
_NUM_FINALISTS = 8
_FIRST_EVALUATIONS = 16
# A change has to pay for more than the noise of the search.
_LEAST_GAIN = 2e-4


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
    split_backward: bool = False,
    evaluations: int = 48,
    max_changes: int = 400,
    progress: Progress | None = None,
) -> ChosenPartition:
    """The best cut found for batches like ``problems``, under their memory limits.

    Args:
        problems: Sample batches of one model on one machine.
        split_backward: Whether the batches will be planned with split backwards.
        evaluations: Schedules that are made to judge a cut on one sample.
        max_changes: Cuts that hill climbing may judge.
        progress: Told about every cut that is judged.

    Raises:
        ConfigError: No problems, or a number below one.
        PartitionError: The problems are of different models or machines, or a module has fewer
            layers than there are ranks to put the least cut on.
        InfeasibleError: No cut keeps the memory limit; the message is that of the best one.
    """
    if evaluations < 1 or max_changes < 0:
        raise ConfigError(
            f"evaluations {evaluations}, max_changes {max_changes} (expected at least 1 and 0)"
        )
    _check_alike(problems)
    judge = _Judge(problems, evaluations, split_backward, progress)
    finalists = _best_segments(judge, problems)
    best = min(finalists, key=judge)
    best = _climb(judge, best, max_changes)
    cost = judge(best)
    if not math.isfinite(cost):
        raise judge.infeasible
    return ChosenPartition(best.partition(), 1 / cost, judge.num_judged)


class _Judge:
    """Mean of ranks x makespan / useful work over the samples: infinite where memory is short."""

    def __init__(
        self,
        problems: Sequence[Problem],
        evaluations: int,
        split_backward: bool,
        progress: Progress | None,
    ) -> None:
        self.problems = problems
        self.num_judged = 0
        self.infeasible = InfeasibleError("no cut was judged")
        self.step = ""
        self.at_most = 0
        self._evaluations = evaluations
        self._split_backward = split_backward
        self._progress = progress
        self._known: dict[str, float] = {}

    def __call__(self, cut: Cut) -> float:
        if cut.name not in self._known:
            self._known[cut.name] = self.cost(cut, self.problems, self._evaluations)
        return self._known[cut.name]

    def cost(self, cut: Cut, problems: Sequence[Problem], evaluations: int) -> float:
        """As calling it, with fewer samples or schedules."""
        self.num_judged += 1
        if self._progress is not None:
            self._progress(self.step, self.num_judged, max(self.at_most, self.num_judged))
        partition = cut.partition()
        try:
            return statistics.mean(
                self._relative_makespan(problem, partition, evaluations) for problem in problems
            )
        except InfeasibleError as error:
            self.infeasible = error
            return math.inf

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


def _best_segments(judge: _Judge, problems: Sequence[Problem]) -> list[Cut]:
    """The most promising numbers of segments, on the sample with the median work."""
    names = problems[0].module_order
    options = [_segment_counts(problems[0], name) for name in names]
    judge.step = "segments"
    judge.at_most = math.prod(map(len, options))
    by_work = sorted(problems, key=useful_work_us)
    sample = by_work[len(by_work) // 2]
    costs: list[tuple[float, int, Cut]] = []
    for counts in itertools.product(*options):
        layers = {
            name: balanced_layers(problems, name, count)
            for name, count in zip(names, counts, strict=True)
        }
        cut = Cut(layers=layers, sub_microbatch_tokens=dict.fromkeys(names))
        # Fewer segments win a tie: they send less.
        costs.append((judge.cost(cut, [sample], _FIRST_EVALUATIONS), len(costs), cut))
    return [cut for _, _, cut in sorted(costs)[:_NUM_FINALISTS]]


def _segment_counts(problem: Problem, module: str) -> list[int]:
    most = max(1, problem.module(module).num_layers // problem.num_ranks)
    return [count for count in _SEGMENT_COUNTS if count <= most]


def _climb(judge: _Judge, cut: Cut, max_changes: int) -> Cut:
    """Changes that pay, until none does or ``max_changes`` have been judged."""
    judge.step = "sizes and layers"
    judge.at_most = last = judge.num_judged + max_changes
    changes = _changes(judge.problems, cut)
    place = num_failed = 0
    while num_failed < len(changes) and judge.num_judged < last:
        # After a gain the search goes on where it was: what comes first has just been tried.
        change = changes[place % len(changes)]
        place += 1
        num_failed += 1
        if judge(change) < judge(cut) * (1 - _LEAST_GAIN):
            cut, num_failed = change, 0
            changes = _changes(judge.problems, cut)
    return cut


def _changes(problems: Sequence[Problem], cut: Cut) -> list[Cut]:
    return [*_sizes(problems, cut), *neighbours(cut)]


def _sizes(problems: Sequence[Problem], cut: Cut) -> Iterator[Cut]:
    """``cut`` with every size of sub-microbatch that is worth a try, module by module."""
    for name in problems[0].module_order:
        shares = [
            [item.tokens for item in problem.items(name, number)]
            for problem in problems
            for number in range(problem.num_microbatches)
        ]
        if max(map(len, shares), default=0) > 1:
            most = max(map(sum, shares))
            for size in (None, *(math.ceil(most / parts) for parts in _PARTS)):
                yield cut.with_tokens(name, size)
