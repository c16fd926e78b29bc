"""Event-driven list scheduling: the engine under 1F1B and the dual queue.

Time advances from event to event.  Whenever a rank is idle it takes the best action that is ready
(all inputs arrived, transfers included) and that its policy admits; it never waits for a better
one.  A rank has three queues: forwards, backwards, and weight gradients of split backwards, which
fill the gaps that the other two leave.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from megatron_dip.errors import InfeasibleError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["Key", "Policy", "schedule_greedily"]

Key = tuple[float, ...]
"""Smaller goes first."""


class Policy(Protocol):
    """What a schedule prefers and what it admits; works are given by their numbers."""

    forward_keys: Sequence[Key]
    backward_keys: Sequence[Key]
    source_keys: Sequence[Key]
    """Order in which works without inputs are offered, one at a time per stage."""

    def prefers_backward(self, rank: int) -> bool:
        """Which queue goes first where both have something."""

    def admits(self, number: int) -> bool:
        """May this forward start now?"""

    def forward_starts(self, number: int) -> None:
        """This forward starts."""

    def backward_starts(self, number: int) -> None:
        """The backward of this work, or its input gradient, starts."""

    def backward_ends(self, number: int) -> None:
        """The last part of this work's backward has ended: what it stored is free."""


def schedule_greedily(
    table: TaskTable, policy: Policy, *, split_backward: bool = False
) -> tuple[tuple[Action, ...], ...]:
    """The compute order that ``policy`` makes of the works in ``table``.

    Raises:
        InfeasibleError: The policy admits nothing although work is left.
    """
    return _Engine(table, policy, split_backward).run()


class _Engine:
    """State of one scheduling run.

    A task is the number of a work plus 0 (forward), N (backward or input gradient) or 2N (weight
    gradient), N being the number of works.
    """

    def __init__(self, table: TaskTable, policy: Policy, split_backward: bool) -> None:
        self.table = table
        self.policy = policy
        self.num_works = len(table.works)
        self.is_split = [split_backward and weight for weight in table.has_weight_grad]
        self.waiting = [len(edges) for edges in table.feeds_from]
        self.waiting += [1 + len(edges) for edges in table.gradients_from]
        self.ready_us = [0.0] * (2 * self.num_works)
        self.forwards: list[list[tuple[Key, int]]] = [[] for _ in range(table.num_ranks)]
        self.backwards: list[list[tuple[Key, int]]] = [[] for _ in range(table.num_ranks)]
        self.weights: list[deque[int]] = [deque() for _ in range(table.num_ranks)]
        self.sources: dict[int, deque[int]] = {}
        self.running: list[int | None] = [None] * table.num_ranks
        self.order: list[list[Action]] = [[] for _ in range(table.num_ranks)]
        # (time, rank that gets free or -1, task that gets ready or -1)
        self.events: list[tuple[float, int, int]] = []

    def run(self) -> tuple[tuple[Action, ...], ...]:
        self._offer_sources()
        now_us = 0.0
        touched = set(range(self.table.num_ranks))
        while True:
            for rank in sorted(touched):
                if self.running[rank] is None:
                    self._start_next(rank, now_us)
            if not self.events:
                break
            now_us = self.events[0][0]
            touched = set()
            while self.events and self.events[0][0] == now_us:
                _, rank, task = heapq.heappop(self.events)
                touched.add(self._free(rank) if rank >= 0 else self._make_ready(task))
        self._check_complete()
        return tuple(tuple(actions) for actions in self.order)

    # ---- queues ---------------------------------------------------------------------------------

    def _offer_sources(self) -> None:
        by_stage: dict[int, list[int]] = {}
        for number, work in enumerate(self.table.works):
            if not self.waiting[number]:
                by_stage.setdefault(work.stage, []).append(number)
        for stage, numbers in by_stage.items():
            numbers.sort(key=lambda number: self.policy.source_keys[number])
            self.sources[stage] = deque(numbers)
            self._offer_next_source(stage)

    def _offer_next_source(self, stage: int) -> None:
        if self.sources[stage]:
            self._make_ready(self.sources[stage].popleft())

    def _make_ready(self, task: int) -> int:
        """Put a forward or backward into its queue; its rank."""
        number = task % self.num_works
        rank = self.table.rank[number]
        if task < self.num_works:
            insort(self.forwards[rank], (self.policy.forward_keys[number], number))
        else:
            heapq.heappush(self.backwards[rank], (self.policy.backward_keys[number], number))
        return rank

    def _free(self, rank: int) -> int:
        """End what ``rank`` is running; ``rank``."""
        task = self.running[rank]
        assert task is not None
        self.running[rank] = None
        kind, number = divmod(task, self.num_works)
        if kind == 2 or (kind == 1 and not self.is_split[number]):
            self.policy.backward_ends(number)
        elif kind == 1:
            self.weights[rank].append(number)
        return rank

    def _start_next(self, rank: int, now_us: float) -> None:
        forwards, backwards = self.forwards[rank], self.backwards[rank]
        if backwards and (not forwards or self.policy.prefers_backward(rank)):
            self._start_backward(rank, now_us)
            return
        for index, (_, number) in enumerate(forwards):
            if self.policy.admits(number):
                del forwards[index]
                self._start_forward(rank, number, now_us)
                return
        if backwards:
            self._start_backward(rank, now_us)
        elif self.weights[rank]:
            number = self.weights[rank].popleft()
            self._run(rank, 2 * self.num_works + number, ActionType.WEIGHT_GRAD, now_us)

    # ---- starting -------------------------------------------------------------------------------

    def _start_forward(self, rank: int, number: int, now_us: float) -> None:
        self.policy.forward_starts(number)
        end_us = self._run(rank, number, ActionType.FORWARD, now_us)
        for other, delay_us in self.table.feeds_to[number]:
            self._arrive(other, end_us + delay_us)
        if self.table.has_backward[number]:
            self._arrive(self.num_works + number, end_us)
        if not self.table.feeds_from[number]:
            self._offer_next_source(self.table.works[number].stage)

    def _start_backward(self, rank: int, now_us: float) -> None:
        _, number = heapq.heappop(self.backwards[rank])
        self.policy.backward_starts(number)
        kind = ActionType.BACKWARD
        if self.is_split[number] or not self.table.has_weight_grad[number]:
            kind = ActionType.INPUT_GRAD
        end_us = self._run(rank, self.num_works + number, kind, now_us)
        for other, delay_us in self.table.gradients_to[number]:
            self._arrive(self.num_works + other, end_us + delay_us)

    def _run(self, rank: int, task: int, kind: ActionType, now_us: float) -> float:
        number = task % self.num_works
        if kind is ActionType.FORWARD:
            duration_us = self.table.forward_us[number]
        elif kind is ActionType.INPUT_GRAD:
            duration_us = self.table.input_grad_us[number]
        elif kind is ActionType.WEIGHT_GRAD:
            duration_us = self.table.weight_grad_us[number]
        else:
            duration_us = self.table.backward_us(number)
        self.order[rank].append(self.table.works[number].action(kind))
        self.running[rank] = task
        end_us = now_us + duration_us
        heapq.heappush(self.events, (end_us, rank, -1))
        return end_us

    def _arrive(self, task: int, time_us: float) -> None:
        self.ready_us[task] = max(self.ready_us[task], time_us)
        self.waiting[task] -= 1
        if not self.waiting[task]:
            heapq.heappush(self.events, (self.ready_us[task], -1, task))

    def _check_complete(self) -> None:
        blocked = [
            f"rank {rank}: {self.table.works[queue[0][1]].action(ActionType.FORWARD)}"
            for rank, queue in enumerate(self.forwards)
            if queue
        ]
        if blocked:
            raise InfeasibleError(
                f"the schedule admits nothing more although work is left: {', '.join(blocked)}"
            )
