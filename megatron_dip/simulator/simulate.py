"""Event simulator: when every compute action of a plan runs, and what memory it takes.

A rank computes its actions strictly in order, each as soon as the rank is free and its inputs have
arrived.  A transfer between ranks takes latency plus bytes over bandwidth and delays neither
computing nor other transfers; a gradient message leaves when its last contributor ends, that is
with ``I`` where the backward is split.  Not modelled: contention of transfers, the time of gradient
reduction and of the optimizer, memory of messages under way.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_dip.errors import PlanDeadlockError, PlanError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.graph import Work
from megatron_dip.plan.plan import Estimate, Plan
from megatron_dip.simulator.tasks import TaskTable, build_task_table

__all__ = [
    "ComputeOrder",
    "Simulation",
    "TimedAction",
    "compute_order",
    "simulate",
    "simulate_order",
]

ComputeOrder = Sequence[Sequence[Action]]
"""Per rank, its compute actions in order."""


class TimedAction(NamedTuple):
    """One compute action and when it runs, in microseconds from the start of the batch."""

    action: Action
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the simulator found; lists are per rank."""

    timelines: tuple[tuple[TimedAction, ...], ...]
    peak_bytes: tuple[int, ...]
    """Weights included."""
    completion_order: tuple[Action, ...]
    """All compute actions by the time of their end; ties in an order that respects dependencies."""

    @cached_property
    def makespan_us(self) -> float:
        return max((line[-1].end_us for line in self.timelines if line), default=0.0)

    @cached_property
    def busy_us(self) -> tuple[float, ...]:
        return tuple(sum(t.end_us - t.start_us for t in line) for line in self.timelines)

    @cached_property
    def bubble_fraction(self) -> tuple[float, ...]:
        """Idle time over makespan; zero for a batch that takes no time."""
        if not self.makespan_us:
            return tuple(0.0 for _ in self.timelines)
        return tuple(max(0.0, 1.0 - busy / self.makespan_us) for busy in self.busy_us)

    def estimate(self, bound_us: float) -> Estimate:
        """The form that a plan carries."""
        return Estimate(
            makespan_us=self.makespan_us,
            peak_bytes=self.peak_bytes,
            bubble_fraction=self.bubble_fraction,
            lower_bound_us=bound_us,
        )


def compute_order(plan: Plan) -> tuple[tuple[Action, ...], ...]:
    """The compute actions of ``plan``, per rank, in order."""
    return tuple(
        tuple(action for action in actions if action.type.is_compute) for actions in plan.actions
    )


def simulate(plan: Plan) -> Simulation:
    """Simulate ``plan``; see :func:`simulate_order`."""
    table = build_task_table(plan.graph, plan.recomputed_layers)
    return simulate_order(table, compute_order(plan))


def simulate_order(table: TaskTable, order: ComputeOrder) -> Simulation:
    """Simulate the compute actions in ``order`` on the costs of ``table``.

    Raises:
        PlanError: An action is not one of the batch or comes twice, or one that others wait for
            is missing.
        PlanDeadlockError: Some actions can never run; the message lists the blocked heads.
    """
    tasks = _Tasks(table, order)
    starts, ends, done = _run(tasks)
    if len(done) < len(tasks.actions):
        raise PlanDeadlockError(_blocked_heads(tasks, set(done)))
    completion = sorted(range(len(done)), key=lambda position: (ends[done[position]], position))
    return Simulation(
        timelines=tuple(
            tuple(TimedAction(tasks.actions[t], starts[t], ends[t]) for t in line)
            for line in tasks.lines
        ),
        peak_bytes=_peak_bytes(tasks),
        completion_order=tuple(tasks.actions[done[position]] for position in completion),
    )


class _Tasks:
    """The actions of an order, numbered, with durations and links."""

    def __init__(self, table: TaskTable, order: ComputeOrder) -> None:
        self.table = table
        self.actions: list[Action] = []
        self.work: list[int] = []
        self.duration_us: list[float] = []
        self.lines: list[list[int]] = []
        num_works = len(table.works)
        self.forward: list[int] = [-1] * num_works
        self.backward: list[int] = [-1] * num_works
        self.weight: list[int] = [-1] * num_works
        for actions in order:
            line = []
            for action in actions:
                line.append(len(self.actions))
                self._add(action)
            self.lines.append(line)
        self.successors: list[list[tuple[int, float]]] = [[] for _ in self.actions]
        self.num_waiting: list[int] = [0] * len(self.actions)
        self._link()

    def _add(self, action: Action) -> None:
        table = self.table
        number = table.numbers.get(Work(action.stage, action.microbatch or 0, action.sub))
        if number is None or not action.type.is_compute:
            raise PlanError(f"{action} is not a compute action of this batch")
        if action.type is ActionType.FORWARD:
            slots, duration = self.forward, table.forward_us[number]
        elif action.type is ActionType.WEIGHT_GRAD:
            slots, duration = self.weight, table.weight_grad_us[number]
        elif action.type is ActionType.INPUT_GRAD:
            slots, duration = self.backward, table.input_grad_us[number]
        else:
            slots, duration = self.backward, table.backward_us(number)
        if slots[number] >= 0:
            raise PlanError(f"{action} comes twice, or beside another backward of its work")
        slots[number] = len(self.actions)
        self.actions.append(action)
        self.work.append(number)
        self.duration_us.append(duration)

    def _link(self) -> None:
        for task, (action, number) in enumerate(zip(self.actions, self.work, strict=True)):
            if action.type is ActionType.FORWARD:
                for other, delay in self.table.feeds_from[number]:
                    self._wait(task, self.forward[other], delay)
            elif action.type is ActionType.WEIGHT_GRAD:
                self._wait(task, self.backward[number], 0.0)
            else:
                self._wait(task, self.forward[number], 0.0)
                for other, delay in self.table.gradients_from[number]:
                    self._wait(task, self.backward[other], delay)
        for line in self.lines:
            for before, after in itertools.pairwise(line):
                self._wait(after, before, 0.0)

    def _wait(self, task: int, for_task: int, delay_us: float) -> None:
        if for_task < 0:
            raise PlanError(f"{self.actions[task]} waits for an action that no rank runs")
        self.successors[for_task].append((task, delay_us))
        self.num_waiting[task] += 1


def _run(tasks: _Tasks) -> tuple[list[float], list[float], list[int]]:
    """Starts and ends per task, and the tasks that ran, each after all that it waits for."""
    num_tasks = len(tasks.actions)
    starts = [0.0] * num_tasks
    ends = [0.0] * num_tasks
    num_waiting = list(tasks.num_waiting)
    done = [task for task in range(num_tasks) if not num_waiting[task]]
    # The list grows while it is walked: it is the queue and its history in one.
    for task in done:
        end = ends[task] = starts[task] + tasks.duration_us[task]
        for successor, delay in tasks.successors[task]:
            starts[successor] = max(starts[successor], end + delay)
            num_waiting[successor] -= 1
            if not num_waiting[successor]:
                done.append(successor)
    return starts, ends, done


def _peak_bytes(tasks: _Tasks) -> tuple[int, ...]:
    """A rank runs one action at a time, so its order alone decides what it holds."""
    table = tasks.table
    peaks = []
    for rank, line in enumerate(tasks.lines):
        held = peak = table.static_bytes[rank]
        for task in line:
            kind, number = tasks.actions[task].type, tasks.work[task]
            if kind is ActionType.FORWARD:
                held += table.stored_bytes[number]
                peak = max(peak, held)
            elif kind is not ActionType.INPUT_GRAD or not table.has_weight_grad[number]:
                held -= table.stored_bytes[number]
        peaks.append(peak)
    return tuple(peaks)


def _blocked_heads(tasks: _Tasks, done: set[int]) -> str:
    heads = []
    for rank, line in enumerate(tasks.lines):
        head = next((task for task in line if task not in done), None)
        if head is not None:
            heads.append(f"rank {rank}: {tasks.actions[head]}")
    return f"these actions can never run: {', '.join(heads)} (each waits for another one)"
