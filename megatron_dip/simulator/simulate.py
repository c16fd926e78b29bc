"""Event simulator: when a plan computes and copies, and what memory that takes.

A rank computes its actions strictly in order, each as soon as the rank is free and its inputs have
arrived.  A transfer between ranks takes latency plus bytes over bandwidth and delays neither
computing nor other transfers; a gradient message leaves when its last contributor ends, that is
with ``I`` where the backward is split.  Copies to the host and back go beside computing, one at a
time in each direction of a rank's link.  A plan that is made for one hardware queue runs as
:mod:`megatron_dip.plan.queues` says.  Not modelled: contention of transfers, the time of gradient
reduction and of the optimizer, memory of messages under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PlanDeadlockError, PlanError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.numbers import (
    BACKWARD_KIND,
    OFFLOAD_KIND,
    TYPE_NUMBERS,
    decode_tasks,
    encode_tasks,
    number_actions,
)
from megatron_dip.plan.plan import Estimate, Plan
from megatron_dip.plan.queues import ActionLists, QueueModel, list_kernels, run_kernels
from megatron_dip.simulator.arrays import (
    FloatArray,
    IntArray,
    TaskOrder,
)
from megatron_dip.simulator.kernels import Stored, new_run_state, peak_bytes, run_order
from megatron_dip.simulator.tasks import TaskTable, build_task_table

__all__ = [
    "ComputeOrder",
    "Simulation",
    "TimedAction",
    "compute_order",
    "decode_order",
    "encode_order",
    "list_durations_us",
    "simulate",
    "simulate_order",
    "simulate_queues",
]

ComputeOrder = Sequence[Sequence[Action]]
"""Per rank, its computing and its copies in order."""


class TimedAction(NamedTuple):
    """One action and when it runs, in microseconds from the start of the batch."""

    action: Action
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the simulator found; lists are per rank."""

    table: TaskTable
    order: TaskOrder
    starts_us: FloatArray
    """[3 N], by the number of the task."""
    ends_us: FloatArray
    copy_starts_us: FloatArray
    """[3 N]: of ``OFFLOAD``, ``RELEASE`` and ``RELOAD``."""
    copy_ends_us: FloatArray
    peak_bytes: tuple[int, ...]
    """Weights included."""
    host_peak_bytes: tuple[int, ...]
    """Of the memory of the host."""
    done: IntArray
    """All tasks but copies, each after all that it waits for."""

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """The order that was simulated."""
        return decode_order(self.table, self.order)

    @cached_property
    def timelines(self) -> tuple[tuple[TimedAction, ...], ...]:
        """When every action of the order runs."""
        starts = np.concatenate([self.starts_us, self.copy_starts_us]).tolist()
        ends = np.concatenate([self.ends_us, self.copy_ends_us]).tolist()
        return tuple(
            tuple(
                TimedAction(action, starts[task], ends[task])
                for action, task in zip(actions, _line(self.order, rank), strict=True)
            )
            for rank, actions in enumerate(self.actions)
        )

    @cached_property
    def completion_order(self) -> IntArray:
        """All tasks but copies, by the time of their end; ties in an order that respects what
        waits for what."""
        return self.done[np.argsort(self.ends_us[self.done], kind="stable")]

    @cached_property
    def makespan_us(self) -> float:
        return float(self.ends_us.max(initial=0.0))

    @cached_property
    def busy_us(self) -> tuple[float, ...]:
        times_us = np.concatenate([self.ends_us - self.starts_us, np.zeros_like(self.copy_ends_us)])
        spent_us = times_us[self.order.task].tolist()
        return tuple(sum(spent_us[start:end]) for start, end in pairwise(self.order.first.tolist()))

    @cached_property
    def bubble_fraction(self) -> tuple[float, ...]:
        """Idle time over makespan; zero for a batch that takes no time."""
        if not self.makespan_us:
            return (0.0,) * self.table.num_ranks
        return tuple(max(0.0, 1.0 - busy / self.makespan_us) for busy in self.busy_us)

    @property
    def has_split_backward(self) -> bool:
        """True where any backward of the order is in two halves."""
        num_works, tasks = self.table.num_works, self.order.task
        return bool(((tasks >= 2 * num_works) & (tasks < OFFLOAD_KIND * num_works)).any())

    def estimate(self, bound_us: float) -> Estimate:
        """The form that a plan carries."""
        return Estimate(
            makespan_us=self.makespan_us,
            peak_bytes=self.peak_bytes,
            bubble_fraction=self.bubble_fraction,
            lower_bound_us=bound_us,
        )


def compute_order(plan: Plan) -> tuple[tuple[Action, ...], ...]:
    """The computing and the copies of ``plan``, per rank, in order."""
    return tuple(
        tuple(action for action in actions if action.type.is_compute or action.type.is_copy)
        for actions in plan.actions
    )


def simulate(plan: Plan) -> Simulation:
    """Simulate ``plan``, with the hardware queues that it names; see :func:`simulate_order`.

    Raises:
        PlanError: As :func:`simulate_order`; or an action is not one of the batch.
        PlanDeadlockError: As :func:`simulate_order`, or the queues let some actions never run.
    """
    table = build_task_table(plan.graph, plan.recomputed_layers, plan.offloaded_layers)
    if plan.queues is None:
        return simulate_order(table, compute_order(plan))
    numbers = number_actions(plan.graph, plan.actions)
    for index in np.flatnonzero(numbers.number < 0)[:1].tolist():
        raise PlanError(f"{numbers.actions[index]} is not an action of this batch")
    lists = ActionLists(numbers.first, numbers.rank, numbers.type, numbers.number)
    return simulate_queues(table, lists, plan.queues)


def simulate_queues(table: TaskTable, lists: ActionLists, queues: QueueModel) -> Simulation:
    """Simulate complete lists of actions, transfers included, with one hardware queue per rank.

    Raises:
        PlanError: As :func:`simulate_order`.
        PlanDeadlockError: Some actions can never run.
    """
    num_works = table.num_works
    tasks = encode_tasks(lists.type, lists.number, num_works)
    is_simulated = np.flatnonzero(tasks >= 0)
    first = np.searchsorted(is_simulated, lists.first)
    simulation = simulate_order(table, TaskOrder(tasks[is_simulated], first))
    kernels = list_kernels(table.graph.wiring, lists, queues.communicators)
    times = run_kernels(kernels, list_durations_us(table, lists))
    if not times.is_done.all():
        raise PlanDeadlockError(
            "with one hardware queue some actions can never run (`megatron-dip validate` names "
            "them)"
        )
    starts_us, ends_us = np.zeros(6 * num_works), np.zeros(6 * num_works)
    starts_us[tasks[is_simulated]] = times.starts_us[is_simulated]
    ends_us[tasks[is_simulated]] = times.ends_us[is_simulated]
    return replace(
        simulation,
        starts_us=starts_us[: 3 * num_works],
        ends_us=ends_us[: 3 * num_works],
        copy_starts_us=starts_us[3 * num_works :],
        copy_ends_us=ends_us[3 * num_works :],
    )


def list_durations_us(table: TaskTable, lists: ActionLists) -> FloatArray:
    """[T] what computing, transfers and copies take; nothing for gradient reductions."""
    wiring = table.graph.wiring
    durations_us = np.zeros(len(lists.type))
    times_us = {
        ActionType.FORWARD: table.forward_us,
        ActionType.BACKWARD: table.backward_us,
        ActionType.INPUT_GRAD: table.input_grad_us,
        ActionType.WEIGHT_GRAD: table.weight_grad_us,
        ActionType.OFFLOAD: table.copy_us,
        ActionType.RELOAD: table.copy_us,
    }
    for kind, works_us in times_us.items():
        found = lists.type == TYPE_NUMBERS[kind]
        durations_us[found] = works_us[lists.number[found]]
    moves = np.isin(lists.type, _TRANSFERS)
    durations_us[moves] = table.transfer_us[wiring.source[lists.number[moves]]]
    return durations_us


def simulate_order(table: TaskTable, order: ComputeOrder | TaskOrder) -> Simulation:
    """Simulate the computing and copying in ``order`` on the costs of ``table``.

    Raises:
        PlanError: An action is not one of the batch or comes twice, or one that others wait for
            is missing.
        PlanDeadlockError: Some actions can never run; the message lists the blocked heads.
    """
    tasks = order if isinstance(order, TaskOrder) else encode_order(table, order)
    state = new_run_state(table.split, tasks)
    num_done, orphan = run_order(table.split, table.whole.duration_us, table.copy_us, tasks, state)
    if orphan >= 0:
        action = _action_of(decode_order(table, tasks), tasks, orphan)
        raise PlanError(f"{action} waits for an action that no rank runs")
    if num_done < np.count_nonzero(tasks.task < OFFLOAD_KIND * table.num_works):
        raise PlanDeadlockError(_blocked_heads(table, tasks, set(state.done[:num_done].tolist())))
    peaks, host_peaks = _peak_bytes(table, tasks)
    return Simulation(
        table=table,
        order=tasks,
        starts_us=state.starts_us,
        ends_us=state.ends_us,
        copy_starts_us=state.copy_starts_us,
        copy_ends_us=state.copy_ends_us,
        peak_bytes=tuple(peaks.tolist()),
        host_peak_bytes=tuple(host_peaks.tolist()),
        done=state.done[:num_done],
    )


def _peak_bytes(table: TaskTable, order: TaskOrder) -> tuple[IntArray, IntArray]:
    """[num_ranks] of the device, weights included, and of the host."""
    num_works = table.num_works
    is_last = np.zeros(3 * num_works, dtype=bool)
    is_last[order.task[order.task < OFFLOAD_KIND * num_works]] = True
    is_last[:num_works] = False
    is_last[num_works : 2 * num_works] &= ~is_last[2 * num_works :]
    peaks = table.static_bytes.copy()
    host_peaks = np.zeros_like(peaks)
    peak_bytes(Stored(table.stored_bytes, table.away_bytes, is_last), order, peaks, host_peaks)
    return peaks, host_peaks


def encode_order(table: TaskTable, order: ComputeOrder) -> TaskOrder:
    """Computing and copies as numbers of tasks.

    Raises:
        PlanError: An action is not one of the batch, comes twice, or is half of a backward.
    """
    num_works = table.num_works
    numbers = number_actions(table.graph, order)
    tasks = encode_tasks(numbers.type, numbers.number, num_works)
    for index in np.flatnonzero((numbers.number < 0) | (tasks < 0))[:1].tolist():
        raise PlanError(f"{numbers.actions[index]} is not a compute action of this batch")
    is_there = np.zeros(6 * num_works, dtype=bool)
    is_there[tasks] = True
    for index in _repeated(tasks)[:1].tolist():
        action = numbers.actions[index]
        raise PlanError(f"{action} comes twice, or beside another backward of its work")
    is_half = numbers.type == TYPE_NUMBERS[ActionType.INPUT_GRAD]
    is_split = is_there[2 * num_works : 3 * num_works] | ~table.has_weight_grad
    is_odd = (tasks // num_works == BACKWARD_KIND) & (is_half != is_split[numbers.number])
    for index in np.flatnonzero(is_odd)[:1].tolist():
        raise PlanError(
            f"{numbers.actions[index]} is not what its backward is here (expected B alone, or I "
            f"and W, or I alone where the layers are frozen)"
        )
    return TaskOrder(tasks, numbers.first)


def _repeated(tasks: IntArray) -> IntArray:
    """Indices of tasks that came before, ascending."""
    by_task = np.argsort(tasks, kind="stable")
    again = np.flatnonzero(np.diff(tasks[by_task]) == 0) + 1
    return np.sort(by_task[again])


def decode_order(table: TaskTable, order: TaskOrder) -> tuple[tuple[Action, ...], ...]:
    """The actions of ``order``, per rank."""
    actions = decode_tasks(table.graph, order.task)
    return tuple(tuple(actions[start:end]) for start, end in pairwise(order.first.tolist()))


_TRANSFERS = [number for kind, number in TYPE_NUMBERS.items() if kind.is_send or kind.is_receive]


def _line(order: TaskOrder, rank: int) -> list[int]:
    return order.task[order.first[rank] : order.first[rank + 1]].tolist()


def _action_of(actions: ComputeOrder, order: TaskOrder, task: int) -> Action:
    place = order.task.tolist().index(task)
    return [action for line in actions for action in line][place]


def _blocked_heads(table: TaskTable, order: TaskOrder, done: set[int]) -> str:
    heads = []
    for rank, actions in enumerate(decode_order(table, order)):
        line = zip(actions, _line(order, rank), strict=True)
        copies = OFFLOAD_KIND * table.num_works
        head = next((action for action, task in line if task < copies and task not in done), None)
        if head is not None:
            heads.append(f"rank {rank}: {head}")
    return f"these actions can never run: {', '.join(heads)} (each waits for another one)"
