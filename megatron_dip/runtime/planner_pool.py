"""The planner processes of one plan owner: who works on what, and what happens when one ends.

A process that ends is started again; what it was asked for goes to the others, or to its successor.
A request over which several processes have ended is given up, so that one bad batch cannot keep
all of them from working.
"""

import logging
import time
from dataclasses import dataclass

from megatron_dip.costs import ProblemBuilder
from megatron_dip.partition import Partition
from megatron_dip.planner import PlannerSettings
from megatron_dip.planner.messages import Failed, Forget, Planned, Ready, Request, Setup
from megatron_dip.runtime.planner_process import PlannerProcess, ProcessLimits, wait_for_any

__all__ = ["PlannerPool"]

logger = logging.getLogger(__name__)

_DEATHS_PER_REQUEST = 3
# A large request is more than the system buffers, and a planner process takes it in at once.
_SEND_PATIENCE_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(kw_only=True)
class _Task:
    """A request under way."""

    request: Request
    member: "_Member | None" = None
    num_deaths: int = 0


@dataclass(kw_only=True, eq=False)
class _Member:
    """A process and what it is doing."""

    process: PlannerProcess
    last_news: float
    """When it last said something, or was given work while it had none."""
    is_ready: bool = False


class PlannerPool:
    """Starts the processes at once; they become ready a second or two later.

    Args:
        num_processes: How many.
        limits: Of each of them.
        silence_seconds: A process that has work and says nothing for so long, beside the time
            that its search may take, is ended.
    """

    def __init__(
        self, num_processes: int, limits: ProcessLimits, *, silence_seconds: float = 60.0
    ) -> None:
        self.num_processes = num_processes
        self.num_ended = 0
        """Processes that have ended and were started again."""
        self._limits = limits
        self._silence_seconds = silence_seconds
        self._setup: Setup | None = None
        self._tasks: dict[int, _Task] = {}
        self._num_failed_starts = 0
        self._next_start = 0.0
        self._members: list[_Member] = []
        self._start_missing()

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(member.process.pid for member in self._members)

    def set_up(
        self, builder: ProblemBuilder, partition: Partition, settings: PlannerSettings
    ) -> None:
        """How requests made from now on are planned."""
        self._setup = Setup(builder=builder, partition=partition, settings=settings)
        for member in self._members:
            member.process.send(self._setup)

    def request(self, request: Request) -> None:
        """Have a batch planned; the process with the least to do gets it."""
        self._tasks[request.number] = _Task(request=request)
        self._assign(self._tasks[request.number])

    def forget(self, number: int) -> None:
        """A plan is not wanted any more, or not from here."""
        task = self._tasks.pop(number, None)
        if task is not None and task.member is not None:
            task.member.process.send(Forget(number=number))

    def is_ready_for(self, number: int) -> bool:
        """Whether a process that is up and running has the request."""
        task = self._tasks.get(number)
        return task is not None and task.member is not None and task.member.is_ready

    def wait(self, seconds: float) -> None:
        """Until there may be something to poll."""
        wait_for_any([member.process for member in self._members], seconds)

    def poll(self) -> list[Planned | Failed]:
        """What has come since the last time; restarts what has ended."""
        news: list[Planned | Failed] = []
        now = time.monotonic()
        for member in list(self._members):
            for message in member.process.receive():
                member.last_news = now
                if isinstance(message, Ready):
                    member.is_ready = True
                    self._num_failed_starts = 0
                elif isinstance(message, Planned | Failed):
                    news.append(message)
                    if isinstance(message, Failed) or message.is_last:
                        self._tasks.pop(message.number, None)
            if not member.process.is_alive or self._is_stuck(member, now):
                news += self._replace(member)
        self._start_missing()
        return news

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.process.end()
        self._members.clear()
        self._tasks.clear()

    def _tasks_of(self, member: _Member) -> list[_Task]:
        return [task for task in self._tasks.values() if task.member is member]

    def _is_stuck(self, member: _Member, now: float) -> bool:
        tasks = self._tasks_of(member)
        if not tasks or not member.is_ready:
            return False
        limit_ms = max(task.request.limit_ms for task in tasks)
        return now - member.last_news > self._silence_seconds + limit_ms / 1000

    def _replace(self, member: _Member) -> list[Failed]:
        """Take over what an ended or stuck process had to do; the failures that this makes."""
        was_alive = member.process.is_alive
        pid, how = member.process.pid, member.process.end()
        if was_alive:
            how = "was stuck, and was ended"
        self._members.remove(member)
        self.num_ended += 1
        if not member.is_ready:
            self._num_failed_starts += 1
        if self._num_failed_starts > 1:
            pause = _FIRST_PAUSE_SECONDS * 2 ** (self._num_failed_starts - 2)
            self._next_start = time.monotonic() + min(pause, _LONGEST_PAUSE_SECONDS)
        if not self.num_ended & (self.num_ended - 1):
            logger.warning(
                "planner process %d %s; another one takes its place (%d so far)",
                pid,
                how,
                self.num_ended,
            )
        failures = []
        for place, task in enumerate(self._tasks_of(member)):
            # It works in the order of the requests: the others are not to blame.
            task.num_deaths += place == 0 and member.is_ready
            if task.num_deaths >= _DEATHS_PER_REQUEST:
                reason = f"{task.num_deaths} planner processes ended over it; the last one {how}"
                failures.append(Failed(number=task.request.number, reason=reason))
                del self._tasks[task.request.number]
            else:
                self._assign(task)
        return failures

    def _start_missing(self) -> None:
        if time.monotonic() < self._next_start:
            return
        while len(self._members) < self.num_processes:
            process = PlannerProcess(self._limits)
            member = _Member(process=process, last_news=time.monotonic())
            self._members.append(member)
            if self._setup is not None:
                process.send(self._setup)
            for task in self._tasks.values():
                if task.member is None:
                    self._give(task, member)

    def _assign(self, task: _Task) -> None:
        """Give ``task`` to a ready process if there is one, to the one with the least to do."""
        task.member = None
        if self._members:
            # The first of equals, so that work goes round: those that have none come first.
            best = min(self._members, key=lambda m: (not m.is_ready, len(self._tasks_of(m))))
            self._give(task, best)

    def _give(self, task: _Task, member: _Member) -> None:
        if not self._tasks_of(member):
            member.last_news = time.monotonic()
        task.member = member
        # One that is still loading takes nothing in: there would be no end to wait for.
        patience_seconds = _SEND_PATIENCE_SECONDS if member.is_ready else 0.0
        member.process.send(task.request, patience_seconds)
