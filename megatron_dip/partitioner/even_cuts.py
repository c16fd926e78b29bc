"""Where the partitioner begins: even cuts, climbed over from neighbour to neighbour.

An even cut is made of a few choices: per module the number of segments, whether they lead in one
direction or there and back, and how finely its microbatches are split; and for all together,
whether every module is balanced over the ranks by itself or all of them together.  They depend on
each other: under a memory limit, many small sub-microbatches and few segments let a microbatch pass
quickly, so that it holds its activations for a short time; with whole microbatches many segments do
better.  All combinations are thousands, so that one choice is changed at a time.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_dip.partitioner.cuts import (
    Cut,
    Layers,
    balanced_counts,
    spread_layers,
    there_and_back,
)
from megatron_dip.partitioner.judge import Judge
from megatron_dip.planner.sub_microbatches import form_sub_microbatches
from megatron_dip.simulator.bounds import useful_work_us
from megatron_dip.workload import Problem

__all__ = ["best_even_cut", "split_sizes"]

_SEGMENT_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
_PARTS = (1.5, 2, 3, 4, 6, 8, 12, 16)
"""Into how many groups the largest microbatch of a module may be split."""
# The parts of the planning budget that cuts are judged with, first and when they are the best.
_FIRST_SHARE = 0.125
_START_SHARE = 0.25
# How many of the best are judged on all samples.
_NUM_STARTS = 4
# The parts of the effort after which no more neighbours are judged, and no more on all samples.
_NEIGHBOURS_SHARE = 0.3
_STARTS_SHARE = 0.4


class _Choice(NamedTuple):
    """Per module where it is a tuple."""

    counts: tuple[int, ...]
    """Places in the numbers of segments."""
    sizes: tuple[int, ...]
    """Places in the sizes."""
    turns: tuple[bool, ...]
    """Whether every other segment leads back."""
    is_joint: bool
    """Whether the modules are balanced together."""


class _EvenCuts:
    """The choices that samples leave."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        self._num_ranks = first.num_ranks
        self._names = first.module_order
        most = [max(1, first.module(name).num_layers // first.num_ranks) for name in self._names]
        self._counts = [tuple(c for c in _SEGMENT_COUNTS if c <= limit) for limit in most]
        sizes = split_sizes(problems)
        self._sizes = [sizes.get(name, [None]) for name in self._names]
        self._balanced = [
            balanced_counts(problems, is_joint=is_joint) for is_joint in (False, True)
        ]

    def starts(self) -> Iterator[_Choice]:
        """One and some segments per module, not split and split finely."""
        modules = range(len(self._names))
        no_turns = (False,) * len(self._names)
        for count, size in itertools.product((0, 1, 3), (0, 3, 6)):
            counts = tuple(min(count, len(self._counts[m]) - 1) for m in modules)
            sizes = tuple(min(size, len(self._sizes[m]) - 1) for m in modules)
            yield _Choice(counts, sizes, no_turns, False)

    def neighbours(self, choice: _Choice) -> Iterator[_Choice]:
        """What differs in one choice."""
        yield choice._replace(is_joint=not choice.is_joint)
        for module in range(len(self._names)):
            for step in (1, -1):
                count, size = choice.counts[module] + step, choice.sizes[module] + step
                if 0 <= size < len(self._sizes[module]):
                    yield choice._replace(sizes=_with(choice.sizes, module, size))
                if 0 <= count < len(self._counts[module]):
                    yield choice._replace(counts=_with(choice.counts, module, count))
            if choice.counts[module] > 0:
                turns = list(choice.turns)
                turns[module] = not turns[module]
                yield choice._replace(turns=tuple(turns))

    def cut(self, choice: _Choice) -> Cut:
        layers: dict[str, Layers] = {}
        for module, name in enumerate(self._names):
            balanced = self._balanced[choice.is_joint][name]
            rows = spread_layers(balanced, self._counts[module][choice.counts[module]])
            layers[name] = there_and_back(rows) if choice.turns[module] else rows
        sizes = {
            name: self._sizes[module][choice.sizes[module]]
            for module, name in enumerate(self._names)
        }
        return Cut(layers=layers, sub_microbatch_tokens=sizes)


def best_even_cut(judge: Judge, problems: Sequence[Problem]) -> Cut:
    """The best found: judged on the sample with the median work first, the best on all."""
    judge.step = "segments"
    by_work = sorted(problems, key=useful_work_us)
    sample = by_work[len(by_work) // 2]
    cuts = _EvenCuts(problems)
    costs: dict[str, tuple[float, int, Cut]] = {}
    expanded: set[_Choice] = set()
    found: list[tuple[float, int, _Choice]] = []

    def look_at(choices: Iterator[_Choice]) -> None:
        for choice in choices:
            cut = cuts.cut(choice)
            if cut.name in costs:
                continue
            (cost,) = judge.costs(cut, [sample], _FIRST_SHARE)
            # The one that was found first wins a tie: it has fewer segments, which send less.
            costs[cut.name] = (cost, len(costs), cut)
            found.append((cost, len(found), choice))

    look_at(cuts.starts())
    while judge.spent_share < _NEIGHBOURS_SHARE:
        best = next((choice for _, _, choice in sorted(found) if choice not in expanded), None)
        if best is None:
            break
        expanded.add(best)
        look_at(cuts.neighbours(best))
    finalists = [cut for _, _, cut in sorted(costs.values(), key=lambda c: c[:2])[:_NUM_STARTS]]
    judged: list[tuple[float, int]] = []
    for number, cut in enumerate(finalists):
        if not judged or judge.spent_share < _STARTS_SHARE:
            costs_of_all = judge.costs(cut, judge.problems, _START_SHARE)
            judged.append((statistics.mean(costs_of_all), number))
    return finalists[min(judged)[1]]


def split_sizes(problems: Sequence[Problem]) -> dict[str, list[int | None]]:
    """Sizes of sub-microbatches that are worth a try, the largest first, of modules that can be
    split; a size that makes the same groups as a larger one is left out."""
    sizes: dict[str, list[int | None]] = {}
    for name in problems[0].module_order:
        most = max(
            sum(item.tokens for item in problem.items(name, number))
            for problem in problems
            for number in range(problem.num_microbatches)
        )
        found: dict[str, int | None] = {}
        for size in (None, *(math.ceil(most / parts) for parts in _PARTS if most)):
            groups = [form_sub_microbatches(problem, {name: size}) for problem in problems]
            found.setdefault(repr(groups), size)
        if len(found) > 1:
            sizes[name] = list(found.values())
    return sizes


def _with(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])
