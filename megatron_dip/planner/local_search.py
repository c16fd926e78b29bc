"""The default search: priority rules, then small changes of the best schedule.

First every rule of the portfolio.  The best schedule of every family of rules is justified and
improved by insertion (below) as it is: what is slow at first often leads further than the fastest.
Then, until the budget is spent, one of these moves to the best of all:

- *reorder*: two microbatches change places in the order of the best rule;
- *justify*: the best schedule is made anew from its end, every action as late as it can be, and
  again from its start, every action as early as it can be, with its times, slightly disturbed, as
  keys (forward-backward improvement of project scheduling; Valls, Ballestin, Quintanilla,
  "Justification and RCPSP", EJOR 165, 2005).  Either every action is disturbed by itself, or a few
  microbatches as a whole: large items only get past one another together with all that follows.
- *insert*: the same by insertion (:mod:`megatron_dip.planner.insertion`): a rank may wait for a
  long item that is on its way instead of starting something else.

As long as justifying and inserting make a schedule better they are done to it in turn: where one
of them finds nothing any more, the other often does.

A move that succeeds more often per schedule made is tried more often.  What is as good as the best
is kept, so that the search can drift.

Several searches share one batch: each tries its part of the rules, and from time to time all go on
from the best of them.  Where memory is short some recompute, and some hold works back: neither
finds what the other does.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_dip.planner.evaluator import Evaluator, Point
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.insertion import Insertion
from megatron_dip.planner.kernels import BY_KEY
from megatron_dip.planner.portfolio import Portfolio, Rule
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator.arrays import FloatArray, IntArray

__all__ = ["STARTS_SHARE", "LocalSearch"]

# How far times are disturbed, as parts of the makespan.
_DISTURBANCES = (0.003, 0.01, 0.03, 0.1)
# Of the budget, what rules may take, from a few good ones moves lead further than more rules, and
# rules and the improvement of their best.
STARTS_SHARE = 0.25
_FAMILIES_SHARE = 0.6
# How much longer it may take at most to hold works back than to recompute, so that a search stays
# with it.
_CLEARLY_WORSE = 1.005
# How often another level of admission is tried.
_OTHER_LEVEL = 0.25

_Rebuild = Callable[[GreedySchedule, FloatArray, int], GreedySchedule | None]
"""From a schedule, disturbances and a level of admission."""


class LocalSearch:
    """A search that spends the budget of ``evaluator``, which keeps the best schedule.

    Args:
        evaluator: Of this search alone.
        seed: Of the random numbers.
        part: Which of ``num_parts`` searches that share the batch this is.
        num_parts: How many share it.
        holds_back: Whether works wait for memory, so that nothing is recomputed; only where another
            search of the evaluator says :attr:`can_hold_back`.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        seed: int,
        *,
        part: int = 0,
        num_parts: int = 1,
        holds_back: bool = False,
    ) -> None:
        self._evaluator = evaluator
        self._random = np.random.default_rng(seed)
        self._batch = evaluator.forwards
        self._portfolio = Portfolio(evaluator.table, self._batch)
        graph = self._batch.graph
        self._exists = graph.exists
        self._duration_us = graph.duration_us
        self._microbatch = np.tile(self._batch.microbatch, 3)[graph.exists]
        self._is_split = bool(graph.exists[2 * len(graph.rank) :].any())
        self._backwards: BatchRules | None = None
        self._insertion: Insertion | None = None
        # Every search begins with the default rule, from which levels are judged.
        starts = itertools.islice(self._portfolio.starts(), 1, None)
        self._starts: Iterator[tuple[Rule, IntArray]] = itertools.islice(
            starts, part, None, num_parts
        )
        self._rule, self._order = next(self._portfolio.starts())
        self._level = 0
        self._current = evaluator.evaluate(self._rule_point(self._rule, self._order, 0))
        self._rule_us = self._current.makespan_us
        self._families: dict[tuple[str, str], GreedySchedule] = {}
        """The best schedule of the rules that sort alike."""
        self._moves: list[Callable[[], None]] = []
        self._spent, self._wins = np.empty(0), np.empty(0)
        self._holds_back = evaluator.holds_back or holds_back
        self.can_hold_back = evaluator.fitter is not None and evaluator.first_level_fits
        """Whether works could wait for memory instead of being recomputed."""
        if not holds_back:
            self._try_levels()
        self._families[self._rule.forward, self._rule.backward] = self._current

    def run(self) -> None:
        """Search until the evaluator says that it is over; may be called again when it is not."""
        evaluator = self._evaluator
        while not self._moves:
            if evaluator.is_over:
                return
            start = next(self._starts, None) if evaluator.spent_share <= STARTS_SHARE else None
            if start is None:
                self._moves = self._make_moves()
                self._spent, self._wins = np.ones(len(self._moves)), np.ones(len(self._moves))
                self._improve_families()
            else:
                self._try_start(*start)
        spent, wins = self._spent, self._wins
        while not evaluator.is_over:
            rates = np.cumsum(wins / spent)
            move = int(np.searchsorted(rates, self._random.random() * rates[-1], side="right"))
            before, before_us = evaluator.num_evaluations, self._current.makespan_us
            self._moves[move]()
            spent[move] += evaluator.num_evaluations - before
            wins[move] += self._current.makespan_us < before_us

    def take_starts_of(self, other: "LocalSearch") -> None:
        """Take over the rules that ``other`` has tried, where they admit what they would here.

        Else the default rule alone is improved, if the part of the budget for rules is spent.
        """
        if other._level == self._level:
            self._starts, self._families = iter(()), dict(other._families)
            self._rule_us, self._rule, self._order = other._rule_us, other._rule, other._order
            for schedule in self._families.values():
                self._keep(schedule, self._level)

    def go_on_from(self, other: "LocalSearch") -> None:
        """Take over what another search of the same batch has found, where that is better.

        One that holds works back stays with that until it is clearly worse than recomputing, once
        its rules are improved.
        """
        if self._holds_back and other._recomputes:
            if not self._moves or other.makespan_us * _CLEARLY_WORSE > self.makespan_us:
                return
            self._holds_back, self._moves = False, []
        self._keep(other._current, other._level)
        if other._rule_us < self._rule_us:
            self._rule_us, self._rule, self._order = other._rule_us, other._rule, other._order

    @property
    def makespan_us(self) -> float:
        """Of the best schedule, from which the search goes on."""
        return self._current.makespan_us

    @property
    def _recomputes(self) -> bool:
        return bool(self._current.num_recomputed.any()) or self._current.loans is not None

    def _try_start(self, rule: Rule, order: IntArray) -> None:
        schedule = self._evaluator.evaluate(self._rule_point(rule, order, self._level))
        if schedule.makespan_us < self._rule_us:
            self._rule_us, self._rule, self._order = schedule.makespan_us, rule, order
        best = self._families.setdefault((rule.forward, rule.backward), schedule)
        if schedule.makespan_us < best.makespan_us:
            self._families[rule.forward, rule.backward] = schedule
        self._keep(schedule, self._level)

    def _improve_families(self) -> None:
        """The fastest first; what is not reached in time is left as it is."""
        for schedule in sorted(self._families.values(), key=lambda one: one.makespan_us):
            if self._evaluator.is_over or self._evaluator.spent_share > _FAMILIES_SHARE:
                return
            self._descend(schedule, np.zeros(len(self._exists)), self._rebuilds(), self._level)

    def _make_moves(self) -> list[Callable[[], None]]:
        evaluator = self._evaluator
        if not self._is_split:
            self._backwards = BatchRules.backwards(evaluator.table, evaluator.levels)
        moves = [self._reorder, self._justify]
        # An order made elsewhere knows nothing of memory.
        if not self._is_split and not self._holds_back:
            self._insertion = Insertion(evaluator.table.whole)
            moves.append(self._insert)
        if evaluator.fitter is not None and not self._holds_back:
            moves.append(self._refit)
        return moves

    def _try_levels(self) -> None:
        """The first rule at every level; the search goes on from the best."""
        for level in range(1, len(self._evaluator.levels)):
            if self._evaluator.is_over:
                return
            point = self._rule_point(self._rule, self._order, level)
            schedule = self._evaluator.evaluate(point)
            if schedule.makespan_us < self._rule_us:
                self._rule_us, self._current, self._level = schedule.makespan_us, schedule, level

    def _rule_point(self, rule: Rule, order: IntArray, level: int) -> Point:
        return self._portfolio.point(rule, order)._replace(level=level)

    def _reorder(self) -> None:
        order = self._order.copy()
        if len(order) > 1:
            first, second = self._random.choice(len(order), 2, replace=False)
            order[[first, second]] = order[[second, first]]
        level = self._next_level()
        schedule = self._evaluator.evaluate(self._rule_point(self._rule, order, level))
        if schedule.makespan_us <= self._rule_us:
            self._rule_us, self._order = schedule.makespan_us, order
        self._keep(schedule, level)

    def _justify(self) -> None:
        self._improve(self._rebuilds(), self._next_level())

    def _insert(self) -> None:
        self._improve(self._rebuilds()[::-1], self._level)

    def _rebuilds(self) -> tuple[_Rebuild, ...]:
        if self._insertion is None:
            return (self._rebuild,)
        return (self._rebuild, self._rebuild_by_insertion)

    def _improve(self, rebuilds: Sequence[_Rebuild], level: int) -> None:
        """The best schedule disturbed and made anew."""
        width_us = self._current.makespan_us * self._random.choice(_DISTURBANCES)
        self._descend(self._current, self._noise_us(width_us), rebuilds, level)

    def _descend(
        self,
        schedule: GreedySchedule,
        noise_us: FloatArray,
        rebuilds: Sequence[_Rebuild],
        level: int,
    ) -> None:
        """``schedule`` disturbed and made anew, for as long as that makes it better."""
        best_us = np.inf
        for rebuild in itertools.cycle(rebuilds):
            found = rebuild(schedule, noise_us, level)
            if found is None or found.makespan_us >= best_us:
                return
            self._keep(found, level)
            if self._evaluator.is_over:
                return
            schedule, best_us, noise_us = found, found.makespan_us, np.zeros(len(noise_us))

    def _noise_us(self, width_us: float) -> FloatArray:
        """[3 N]: for every action by itself, or for one to four microbatches."""
        if self._random.random() < 0.5:
            return self._random.normal(0.0, width_us, len(self._exists))
        num_microbatches = len(self._portfolio.load_us)
        shift_us = np.zeros(num_microbatches)
        shifted = self._random.integers(num_microbatches, size=self._random.integers(1, 5))
        shift_us[shifted] = self._random.normal(0.0, 3 * width_us, len(shifted))
        return np.tile(shift_us[self._batch.microbatch], 3)

    def _refit(self) -> None:
        """Other layers for the best order: recompute where it has slack, until that ends."""
        evaluator, current = self._evaluator, self._current
        assert evaluator.fitter is not None, "a move only where not everything fits at once"
        while not evaluator.is_over:
            slack_us = evaluator.fitter.slack_us(current.order, current.num_recomputed)
            weights = evaluator.fitter.weights(slack_us)
            if current.weights is not None:
                weights = (weights + current.weights) / 2
            schedule = evaluator.refit(current, weights)
            if schedule is None or schedule.makespan_us >= current.makespan_us:
                return
            current = schedule
            self._keep(schedule, self._level)

    def _next_level(self) -> int:
        """Mostly that of the best schedule, now and then the one beside it."""
        if (
            self._holds_back
            or len(self._evaluator.levels) == 1
            or self._random.random() >= _OTHER_LEVEL
        ):
            return self._level
        step = 1 if self._random.random() < 0.5 else -1
        return min(max(self._level + step, 0), len(self._evaluator.levels) - 1)

    def _rebuild(
        self, schedule: GreedySchedule, noise_us: FloatArray, level: int
    ) -> GreedySchedule | None:
        starts_us = schedule.starts_us + noise_us
        duration_us = self._times_us(schedule)
        if self._backwards is not None:
            ends_us = starts_us + duration_us
            point = Point(
                -ends_us,
                BY_KEY,
                self._by_end(ends_us)[::-1].copy(),
                level,
                near=schedule,
            )
            late = self._evaluator.schedule(self._backwards, point)
            if late is None:
                return None
            starts_us = late.makespan_us - late.starts_us - duration_us
        order = self._by_start(starts_us)
        return self._evaluator.evaluate(Point(starts_us, BY_KEY, order, level, near=schedule))

    def _rebuild_by_insertion(
        self, schedule: GreedySchedule, noise_us: FloatArray, level: int
    ) -> GreedySchedule | None:
        assert self._insertion is not None, "a move only for whole backwards"
        duration_us = self._times_us(schedule)
        ends_us = schedule.starts_us + duration_us + noise_us
        late_us = self._insertion.late(ends_us, duration_us)
        starts_us, order = self._insertion.early(late_us, duration_us)
        return self._evaluator.take(order, starts_us, schedule)

    def _times_us(self, schedule: GreedySchedule) -> FloatArray:
        """[3 N]: durations with what ``schedule`` recomputes."""
        if self._evaluator.fitter is None:
            return self._duration_us
        return self._evaluator.fitter.durations_us(schedule.num_recomputed)

    def _keep(self, schedule: GreedySchedule, level: int) -> None:
        if schedule.makespan_us <= self._current.makespan_us:
            self._current, self._level = schedule, level

    def _by_end(self, ends_us: FloatArray) -> IntArray:
        """Microbatches by the time at which the last of their tasks ends."""
        last_us = np.full(len(self._portfolio.load_us), -np.inf)
        np.maximum.at(last_us, self._microbatch, ends_us[self._exists])
        return np.argsort(last_us, kind="stable")

    def _by_start(self, starts_us: FloatArray) -> IntArray:
        """Microbatches by the time at which the first of their tasks starts."""
        first_us = np.full(len(self._portfolio.load_us), np.inf)
        np.minimum.at(first_us, self._microbatch, starts_us[self._exists])
        return np.argsort(first_us, kind="stable")
