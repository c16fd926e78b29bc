"""What a cut is worth: sample batches planned on it, counted in actions that are put in order.

Batches are planned in a given time, in which fewer schedules are made on a cut with more actions.
So cuts are judged at equal time, not at equal schedules.
"""

import math
from collections.abc import Callable, Sequence

from megatron_dip.errors import DipError, InfeasibleError, PartitionError
from megatron_dip.partition.stages import Partition
from megatron_dip.partitioner.cuts import Cut
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.evaluator import Budget
from megatron_dip.planner.search import search_schedule
from megatron_dip.planner.sub_microbatches import form_sub_microbatches
from megatron_dip.simulator.bounds import useful_work_us
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.workload import Problem

__all__ = ["Judge", "Progress"]

Progress = Callable[[str, int, float], None]
"""Called with what is being done, how many cuts have been judged, and the part of the effort that
is spent, from 0 to 1."""

# Actions that are put in order in a second of one core of 2.5 GHz; a schedule takes as long as some
# actions more than it has.
_ACTIONS_PER_SECOND = 1.6e6
_ACTIONS_PER_SCHEDULE = 1500
# Which of two cuts is better, more schedules hardly change.
_ENOUGH_EVALUATIONS = 256
# A cut that is worse by so much on the first sample is given up; by less on the first two, ...
_CLEARLY_WORSE = 0.02


class Judge:
    """Ranks x makespan / useful work on samples: infinite where memory is short.

    What judging takes is counted in actions, so that what is judged within an effort does not
    depend on the machine.

    Args:
        problems: The samples.
        budget: What one of them is planned in.
        split_backward: Whether batches will be planned with split backwards.
        minutes: The effort, on one core of 2.5 GHz.
        progress: Told about every cut that is judged.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        budget: Budget,
        split_backward: bool,
        minutes: float,
        progress: Progress | None,
    ) -> None:
        self.problems = problems
        self.num_judged = 0
        self.infeasible: DipError = InfeasibleError("no cut was judged")
        """Why the last cut that was given up for good was."""
        self.step = ""
        self._split_backward = split_backward
        self._budget = budget
        self._effort = minutes * 60 * _ACTIONS_PER_SECOND
        self._spent = 0.0
        self._progress = progress

    @property
    def spent_share(self) -> float:
        """The part of the effort that is spent; above 1 once it is over."""
        return self._spent / self._effort

    def effort(self, cut: Cut, share: float) -> float:
        """The part of the effort that judging ``cut`` on all samples takes, as :meth:`costs`."""
        partition = cut.partition()
        tables = [self._table(problem, partition) for problem in self.problems]
        return sum(_num_actions(t, self._num_evaluations(t, share)) for t in tables) / self._effort

    def costs(
        self,
        cut: Cut,
        problems: Sequence[Problem],
        share: float,
        known: Sequence[float] | None = None,
    ) -> list[float]:
        """Per sample, planned with ``share`` of the budget; the last one is infinite where the cut
        is clearly worse than one that costs ``known``, and has not been judged on the others."""
        self.num_judged += 1
        if self._progress is not None:
            self._progress(self.step, self.num_judged, min(1.0, self.spent_share))
        partition = cut.partition()
        costs: list[float] = []
        try:
            partition.check_ranks(problems[0].num_ranks)
        except PartitionError as error:
            self.infeasible = error
            return [math.inf]
        for problem in problems:
            try:
                costs.append(self._relative_makespan(problem, partition, share))
            except InfeasibleError as error:
                self.infeasible = error
                return [*costs, math.inf]
            if known is not None:
                margin = 1 + _CLEARLY_WORSE / math.sqrt(len(costs))
                if sum(costs) > margin * sum(known[: len(costs)]):
                    return [*costs, math.inf]
        return costs

    def _relative_makespan(self, problem: Problem, partition: Partition, share: float) -> float:
        table = self._table(problem, partition)
        evaluations = self._num_evaluations(table, share)
        self._spent += _num_actions(table, evaluations)
        schedule = search_schedule(
            table, evaluations=evaluations, split_backward=self._split_backward
        )
        return schedule.makespan_us * problem.num_ranks / useful_work_us(problem)

    def _num_evaluations(self, table: TaskTable, share: float) -> int:
        most = self._budget.evaluations or 0.0
        if self._budget.milliseconds is not None:
            actions = self._budget.milliseconds / 1000 * _ACTIONS_PER_SECOND
            most = min(actions / _num_actions(table, 1), _ENOUGH_EVALUATIONS)
        return max(1, round(share * most))

    def _table(self, problem: Problem, partition: Partition) -> TaskTable:
        groups = form_sub_microbatches(problem, partition.sub_microbatch_tokens)
        return build_task_table(PipelineGraph(problem, partition, groups))


def _num_actions(table: TaskTable, evaluations: int) -> float:
    """What searching takes, a search that finds the best possible at once included."""
    return evaluations * (2.0 * table.num_works + _ACTIONS_PER_SCHEDULE)
