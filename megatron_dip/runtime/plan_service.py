"""The plan service: what the plan owner asks of its planner processes, and what it gets.

Batches are requested ahead and planned beside training.  When training needs a plan it gets the
searched one, or, where that is late, in this order: with no planner process ready, what the owner
itself can plan within the wait limit; after the limit the best plan so far; one without a search.
Every such plan is correct; how often one was used is counted and said.  Nothing runs in this
process between the calls: messages are read when training comes by, so that no thread takes time
from it.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from statistics import median

from megatron_dip.costs import ProblemBuilder
from megatron_dip.errors import PlanningError
from megatron_dip.partition import Partition
from megatron_dip.planner import Batch, PlannerSettings, plan_in_rounds
from megatron_dip.planner.messages import Planned, Request
from megatron_dip.runtime.planner_pool import PlannerPool

__all__ = ["ObtainedPlan", "Origin", "PlanCounts", "PlanService", "ServiceLimits"]

logger = logging.getLogger(__name__)

_MAX_JOBS = 64
_STEPS_REMEMBERED = 8
# Of the time until a plan is needed: the rest is for what a search cannot see, its transport.
_SEARCH_SHARE = 0.8
# What the system takes to wake a waiting process: part of what training waits.
_WAKE_UP_MS = 2.0


class Origin(StrEnum):
    """Where a plan came from."""

    SEARCHED = "searched"
    CUT_SHORT = "cut short"
    """The best that was found in the time there was."""
    FALLBACK = "fallback"
    """Without a search."""


@dataclass(frozen=True, kw_only=True)
class ObtainedPlan:
    """A plan for a batch, ready to be sent to all ranks."""

    packed: bytes
    origin: Origin
    planning_ms: float
    """What the planner took."""
    waited_ms: float = 0.0
    """What training waited for it."""

    def summary(self) -> dict[str, str | float]:
        """All but the plan, for records of a run."""
        return {
            "origin": str(self.origin),
            "planning_ms": self.planning_ms,
            "waited_ms": self.waited_ms,
        }


@dataclass(kw_only=True)
class PlanCounts:
    """What the service has done so far."""

    plans: dict[Origin, int] = field(default_factory=lambda: dict.fromkeys(Origin, 0))
    planned_by_owner: int = 0
    """Plans that training waited for, because no planner process was ready."""

    @property
    def num_lesser(self) -> int:
        return self.plans[Origin.CUT_SHORT] + self.plans[Origin.FALLBACK]

    @property
    def num_plans(self) -> int:
        return sum(self.plans.values())


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """Times of the service."""

    wait_ms: float
    """The longest that training waits for a plan that is late."""
    search_ms: float | None
    """The longest that a batch is searched; from the measured time of a step if not given."""
    steps_ahead: int
    """Steps between the request of a plan and its use."""


@dataclass(kw_only=True)
class _Job:
    """A request and what has come of it."""

    number: int
    batch: Batch
    best: Planned | None = None
    fallback: bytes = b""
    failure: str = ""

    @property
    def is_over(self) -> bool:
        return bool(self.failure) or (self.best is not None and self.best.is_last)


class PlanService:
    """Plans the batches of one pipeline, or of replicas that share plans; on the plan owner alone.

    Args:
        builder: Of the problems; see :meth:`set_builder`.
        partition: The cut of the run.
        settings: How batches are planned.
        pool: The planner processes.
        limits: How long training waits and batches are searched.
    """

    def __init__(
        self,
        *,
        builder: ProblemBuilder,
        partition: Partition,
        settings: PlannerSettings,
        pool: PlannerPool,
        limits: ServiceLimits,
    ) -> None:
        self.counts = PlanCounts()
        self._partition = partition
        self._settings = settings
        self._pool = pool
        self._limits = limits
        self._jobs: dict[tuple[str, ...], _Job] = {}
        self._num_requests = 0
        self._step_ends: deque[float] = deque(maxlen=_STEPS_REMEMBERED + 1)
        self.set_builder(builder)

    def set_builder(self, builder: ProblemBuilder) -> None:
        """Plan all batches requested from now on with these costs."""
        self._pool.set_up(builder, self._partition, self._settings)

    def note_step(self) -> None:
        """A step of training begins: the time between two of them bounds the search."""
        self._step_ends.append(time.monotonic())

    def request(self, batch: Batch) -> None:
        """Have ``batch`` planned; returns at once.  Asked for again, it is planned once."""
        self._poll()
        if batch.digests in self._jobs:
            return
        job = _Job(number=self._num_requests, batch=batch)
        self._num_requests += 1
        self._jobs[batch.digests] = job
        self._pool.request(
            Request(
                number=job.number,
                replicas=batch.replicas,
                limit_ms=self._search_limit_ms(),
            )
        )
        if len(self._jobs) > _MAX_JOBS:
            # Batches that training never came to: it changed their size, or went elsewhere.
            self._drop(next(iter(self._jobs.values())))

    def take_ready(self, batch: Batch) -> ObtainedPlan | None:
        """The plan of ``batch`` if its planning is over; without waiting.

        If it is not, a plan without a search is made in case that nothing better comes in time:
        here it delays the end of a step, where a GPU is still at work, and not the next one.
        """
        self._poll()
        job = self._jobs.get(batch.digests)
        if job is None:
            return None
        if job.best is not None and job.best.is_last:
            return self._obtained(job, waited_ms=0.0)
        if job.best is None and not job.fallback:
            # Where even this fails, all ranks hear of it when they need the plan.
            with suppress(PlanningError):
                job.fallback = self._plan_fallback(job)
        return None

    def obtain(self, batch: Batch) -> ObtainedPlan:
        """The best plan that there is for ``batch`` within the wait limit.

        Raises:
            PlanningError: Not even 1F1B can be planned.
        """
        started = time.monotonic()
        limit_ms = self._limits.wait_ms - _WAKE_UP_MS
        self.request(batch)
        job = self._jobs[batch.digests]
        while True:
            self._poll()
            left_ms = limit_ms - (time.monotonic() - started) * 1000
            if job.is_over or left_ms <= 0 or not self._pool.is_ready_for(job.number):
                break
            self._pool.wait(left_ms / 1000)
        if not job.is_over and left_ms > 0:
            self._plan_here(job, left_ms)
        return self._obtained(job, waited_ms=(time.monotonic() - started) * 1000)

    def close(self) -> None:
        """End the planner processes."""
        self._pool.close()

    def _poll(self) -> None:
        jobs = {job.number: job for job in self._jobs.values()}
        for message in self._pool.poll():
            job = jobs.get(message.number)
            if job is None:
                continue
            if isinstance(message, Planned):
                known = job.best.packed if job.best is not None else b""
                job.best = replace(message, packed=message.packed or known)
            else:
                job.failure = message.reason

    def _search_limit_ms(self) -> float:
        """How long the next request may be searched, so that plans come as fast as steps do."""
        if self._limits.search_ms is not None:
            return self._limits.search_ms
        if len(self._step_ends) < 2:
            return self._limits.wait_ms
        step_ms = 1000 * median(end - start for start, end in pairwise(self._step_ends))
        batches_at_once = min(self._pool.num_processes, self._limits.steps_ahead)
        return _SEARCH_SHARE * step_ms * max(1, batches_at_once)

    def _plan_here(self, job: _Job, limit_ms: float) -> None:
        """Plan in this process: none other is ready, at the start of a run for one."""
        self.counts.planned_by_owner += 1
        self._pool.forget(job.number)
        started = time.monotonic()
        try:
            problem = job.batch.problem
            for found in plan_in_rounds(problem, self._partition, self._settings, limit_ms):
                job.best = Planned(
                    number=job.number,
                    packed=job.batch.pack(found.plan),
                    is_last=found.is_last,
                    is_searched=found.is_searched,
                    planning_ms=(time.monotonic() - started) * 1000,
                    warnings=(),
                )
        # A mistake in the planner must not end training while there is another plan.
        except Exception as error:
            logger.debug("planning failed", exc_info=True)
            job.failure = f"{type(error).__name__}: {error}"

    def _obtained(self, job: _Job, waited_ms: float) -> ObtainedPlan:
        """What is sent to the ranks for ``job``, which ends here."""
        self._drop(job)
        best = job.best
        if best is None:
            obtained = self._fallback(job, waited_ms)
        else:
            for text in best.warnings:
                logger.warning("%s", text)
            obtained = ObtainedPlan(
                packed=best.packed,
                origin=Origin.SEARCHED if best.is_searched else Origin.CUT_SHORT,
                planning_ms=best.planning_ms,
                waited_ms=waited_ms,
            )
        self.counts.plans[obtained.origin] += 1
        if obtained.origin != Origin.SEARCHED:
            self._say_lesser(job, obtained)
        return obtained

    def _fallback(self, job: _Job, waited_ms: float) -> ObtainedPlan:
        started = time.monotonic()
        packed = job.fallback or self._plan_fallback(job)
        planning_ms = (time.monotonic() - started) * 1000
        return ObtainedPlan(
            packed=packed,
            origin=Origin.FALLBACK,
            planning_ms=planning_ms,
            waited_ms=waited_ms + planning_ms,
        )

    def _plan_fallback(self, job: _Job) -> bytes:
        try:
            plan = self._settings.fallback(job.batch.problem, self._partition)
            return job.batch.pack(plan)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            also = f"; before that: {job.failure}" if job.failure else ""
            raise PlanningError(f"not even 1F1B can be planned: {reason}{also}") from error

    def _say_lesser(self, job: _Job, obtained: ObtainedPlan) -> None:
        """At the first, second, fourth, eighth ... of them: often enough to be seen."""
        num_lesser = self.counts.num_lesser
        if num_lesser & (num_lesser - 1):
            return
        used = (
            "the best plan so far"
            if obtained.origin == Origin.CUT_SHORT
            else "a plan without a search"
        )
        why = job.failure or (
            f"the search was not done after {obtained.planning_ms:.0f} ms"
            if job.best is not None
            else f"there was no plan after waiting {obtained.waited_ms:.0f} ms"
        )
        logger.warning(
            "a batch is trained with %s (%d of %d batches so far; correct, but maybe slower): %s",
            used,
            num_lesser,
            self.counts.num_plans,
            why,
        )

    def _drop(self, job: _Job) -> None:
        self._jobs.pop(job.batch.digests)
        self._pool.forget(job.number)
