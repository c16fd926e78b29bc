"""The best contiguous cuts of the flat chain, fitted on sample problems.

The start minimises the mean work of the largest piece (a dynamic programme over the layers).  Hill
climbing follows: a layer leaves one piece for another, the pieces between them shift by one layer,
and what makes the mean simulated makespan of the samples shorter is kept.  All numbers of pieces
per rank are tried, first with layers moving to neighbours only, the best few then with all moves of
up to a round of the ranks.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import InfeasibleError, ProblemError
from megatron_dip.partition import cut_evenly
from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.static import (
    StaticRun,
    StaticSimulator,
    run_with_own_recomputation,
    run_within_memory,
)
from megatron_dip.simulator.arrays import FloatArray, IntArray
from megatron_dip.workload import Problem

__all__ = ["MAX_VIRTUAL", "StaticCuts", "balanced_layers", "even_layers"]

MAX_VIRTUAL = 12
"""Most pieces per rank that are tried; on the sample problems the best are 2 to 11."""

# How many numbers of pieces per rank are climbed with all moves.
_NUM_FINALISTS = 4

# What counts as shorter: more than rounding.
_GAIN = 1e-9


class _Fitted(NamedTuple):
    mean_us: float
    """Mean simulated makespan of the samples."""
    layers: tuple[int, ...]


class StaticCuts:
    """Cuts for the model of ``samples``, each made when it is first asked for.

    Raises:
        ProblemError: There are no samples, or they are not of one model on equally many ranks.
    """

    def __init__(self, samples: Sequence[Problem]) -> None:
        if not samples:
            raise ProblemError("no problems to fit static cuts on (expected at least one)")
        self._first = samples[0]
        self._num_ranks = samples[0].num_ranks
        for sample in samples:
            self.check_fits(sample)
        self._simulators = [StaticSimulator(FlatChain(sample)) for sample in samples]

    def check_fits(self, problem: Problem) -> None:
        """Raise ProblemError unless ``problem`` has the samples' modules and number of ranks."""
        expected, given = _model(self._first), _model(problem)
        if given != expected:
            raise ProblemError(
                f"static cuts fitted on problems with {expected} do not fit a problem with {given} "
                f"(expected the same modules, layers and ranks)"
            )

    @cached_property
    def one_f_one_b(self) -> StaticCut:
        """The best cut with one piece per rank."""
        return self._cut(self._climb(self._start(1)))

    @cached_property
    def interleaved(self) -> StaticCut:
        """The best cut with several pieces per rank.

        Raises:
            InfeasibleError: There are too few layers, or a sample has fewer microbatches than
                ranks, which Megatron refuses.
        """
        return self._interleaved(None)

    @cached_property
    def interleaved_within_memory(self) -> StaticCut:
        """The same under the memory limit, where every piece computes again as many layers as the
        sample needs.

        Raises:
            InfeasibleError: See :meth:`interleaved`; or no cut on the way keeps the limit of a
                sample.
        """
        return self._interleaved(partial(self._mean_limited_us, run_within_memory))

    def _interleaved(self, limited_us: Callable[[Sequence[int]], float] | None) -> StaticCut:
        counts = self._virtual_counts(self._simulators[0].chain.num_layers)
        found = sorted(self._climb(self._start(count), 1, limited_us) for count in counts)
        best = min(self._climb(each.layers, None, limited_us) for each in found[:_NUM_FINALISTS])
        if not np.isfinite(best.mean_us):
            raise InfeasibleError("no cut with several pieces per rank keeps the memory limit")
        return self._cut(best)

    @cached_property
    def one_f_one_b_stock(self) -> StaticCut:
        """All encoders on rank 0, before its even share of the backbone, the last module."""
        return self._cut(self._stock(1))

    @cached_property
    def interleaved_stock(self) -> StaticCut:
        """All encoders in the first piece, the backbone cut evenly into the best number of pieces.

        Raises:
            InfeasibleError: See :meth:`interleaved`.
        """
        counts = self._virtual_counts(self._backbone_layers)
        return self._cut(min(self._stock(count) for count in counts))

    @cached_property
    def megatron(self) -> StaticCut:
        """Pieces of about equally many parameters, in the best number of them per rank.

        Raises:
            InfeasibleError: See :meth:`interleaved`.
        """
        counts = self._virtual_counts(self._simulators[0].chain.num_layers)
        return self._cut(min(self._of_even_parameters(count) for count in counts))

    @cached_property
    def megatron_in_four(self) -> StaticCut:
        """Four pieces per rank, of about equally many parameters.

        Raises:
            InfeasibleError: There are fewer layers than pieces.
        """
        return self._cut(self._of_even_parameters(4))

    def _of_even_parameters(self, num_virtual: int) -> _Fitted:
        weights = self._simulators[0].chain.layer_parameters
        layers = even_layers(weights, num_virtual * self._num_ranks)
        return _Fitted(self._mean_us(layers), layers)

    @cached_property
    def nnscaler(self) -> StaticCut:
        """The best cut with one piece per rank under the memory limit, where every rank computes
        again as few layers as it must.

        Raises:
            InfeasibleError: No cut on the way keeps the limit of a sample.
        """
        found = self._climb(
            self._start(1), limited_us=partial(self._mean_limited_us, run_with_own_recomputation)
        )
        if not np.isfinite(found.mean_us):
            raise InfeasibleError("no cut with one piece per rank keeps the memory limit")
        return self._cut(found)

    @property
    def _backbone_layers(self) -> int:
        return self._first.module(self._first.module_order[-1]).num_layers

    def _virtual_counts(self, num_layers: int) -> range:
        most = min(MAX_VIRTUAL, num_layers // self._num_ranks)
        if most < 2:
            raise InfeasibleError(
                f"{num_layers} layers on {self._num_ranks} ranks: an interleaved schedule needs at "
                f"least two layers on every rank"
            )
        return range(2, most + 1)

    def _stock(self, num_virtual: int) -> _Fitted:
        if self._backbone_layers < num_virtual * self._num_ranks:
            raise InfeasibleError(
                f"{self._backbone_layers} backbone layers on {self._num_ranks} ranks: the stock "
                f"placement needs a layer on every rank"
            )
        rounds = cut_evenly(self._backbone_layers, num_virtual, self._num_ranks)
        first, *others = (count for one_round in rounds for count in one_round)
        num_encoder_layers = self._simulators[0].chain.num_layers - self._backbone_layers
        layers = (num_encoder_layers + first, *others)
        return _Fitted(self._mean_us(layers), layers)

    @cached_property
    def _layer_us(self) -> FloatArray:
        """[layers of the chain]: forward and backward, mean over samples and microbatches."""
        chains = [simulator.chain for simulator in self._simulators]
        until_us = [chain.forward_until_us + chain.backward_until_us for chain in chains]
        return np.mean([np.diff(until, axis=0).mean(axis=1) for until in until_us], axis=0)

    def _start(self, num_virtual: int) -> tuple[int, ...]:
        return balanced_layers(self._layer_us, num_virtual * self._num_ranks)

    def _climb(
        self,
        start: Sequence[int],
        longest_move: int | None = None,
        limited_us: Callable[[Sequence[int]], float] | None = None,
    ) -> _Fitted:
        longest_move = longest_move or self._num_ranks
        layers = list(start)

        def mean_us(most_us: float) -> float:
            found_us = self._mean_us(layers)
            # Recomputing makes nothing faster: what is too slow without it is not tried with it.
            return limited_us(layers) if limited_us and found_us < most_us else found_us

        best_us = mean_us(np.inf)
        moves = [
            (left + away, left) if is_up else (left, left + away)
            for away in range(1, longest_move + 1)
            for left in range(len(layers) - away)
            for is_up in (False, True)
        ]
        has_improved = True
        while has_improved:
            has_improved = False
            for giver, taker in moves:
                while layers[giver] > 1:
                    layers[giver] -= 1
                    layers[taker] += 1
                    enough_us = best_us * (1 - _GAIN)
                    found_us = mean_us(enough_us)
                    if not found_us < enough_us:
                        layers[giver] += 1
                        layers[taker] -= 1
                        break
                    best_us, has_improved = found_us, True
        return _Fitted(best_us, tuple(layers))

    def _mean_us(self, layers: Sequence[int]) -> float:
        cut = StaticCut(num_ranks=self._num_ranks, num_layers=tuple(layers))
        times = [simulator.makespan_us(cut) for simulator in self._simulators]
        return sum(times) / len(times)

    def _mean_limited_us(
        self, run: Callable[[StaticSimulator, StaticCut], StaticRun], layers: Sequence[int]
    ) -> float:
        cut = StaticCut(num_ranks=self._num_ranks, num_layers=tuple(layers))
        try:
            runs = [run(simulator, cut) for simulator in self._simulators]
        except InfeasibleError:
            return float("inf")
        return sum(run.makespan_us for run in runs) / len(runs)

    def _cut(self, fitted: _Fitted) -> StaticCut:
        return StaticCut(num_ranks=self._num_ranks, num_layers=fitted.layers)


def balanced_layers(layer_us: FloatArray, num_pieces: int) -> tuple[int, ...]:
    """Layers per piece, at least one, such that the largest piece takes as little as it can.

    Raises:
        InfeasibleError: There are fewer layers than pieces.
    """
    return _best_layers(_pieces(layer_us, num_pieces), num_pieces, np.maximum)


def even_layers(weights: FloatArray, num_pieces: int) -> tuple[int, ...]:
    """Layers per piece, at least one, such that the squares of what pieces weigh sum to the least.

    Raises:
        InfeasibleError: There are fewer layers than pieces.
    """
    return _best_layers(_pieces(weights, num_pieces) ** 2, num_pieces, np.add)


def _best_layers(piece: FloatArray, num_pieces: int, join: np.ufunc) -> tuple[int, ...]:
    """Layers per piece, such that what ``join`` makes of all pieces' costs is the least.

    Args:
        piece: [from, to]: what a piece of these layers costs.
        num_pieces: How many there are.
        join: Of the cost so far and that of one piece more.
    """
    # Entry n: the least cost if the first n layers fill the pieces so far.
    least = np.full(len(piece), np.inf)
    least[0] = 0.0
    starts = []
    for _ in range(num_pieces):
        candidates = join(least[:, None], piece)
        starts.append(candidates.argmin(axis=0))
        least = candidates.min(axis=0)
    return _layers_from(starts)


def _pieces(layer: FloatArray, num_pieces: int) -> FloatArray:
    """[from, to]: sum over the layers of every possible piece; infinite where there is none."""
    num_layers = len(layer)
    if num_layers < num_pieces:
        raise InfeasibleError(
            f"{num_layers} layers cannot fill {num_pieces} pieces (expected at least as many)"
        )
    until = np.concatenate([[0.0], np.cumsum(layer)])
    piece = until[None, :] - until[:, None]
    piece[np.tril_indices(num_layers + 1)] = np.inf
    return piece


def _layers_from(starts: Sequence[IntArray]) -> tuple[int, ...]:
    """Layers per piece, from where every piece starts if it ends at a layer."""
    layers = []
    end = len(starts[0]) - 1
    for start in reversed(starts):
        layers.append(end - int(start[end]))
        end = int(start[end])
    return tuple(reversed(layers))


def _model(problem: Problem) -> str:
    modules = [
        f"{module.name} ({'' if module.trainable else 'frozen, '}{module.num_layers} layers"
        + (f", reads {' and '.join(module.upstream)})" if module.upstream else ")")
        for module in problem.modules
    ]
    return f"{', '.join(modules)} on {problem.num_ranks} ranks"
