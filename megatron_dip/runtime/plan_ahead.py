"""Plans made ahead of their steps, on one rank: the plan service and the agreement together."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dip.costs import BatchSizes, ProblemBuilder
from megatron_dip.errors import PlanningError
from megatron_dip.planner import Batch, PlannedBatch
from megatron_dip.runtime.agreement import PlanAgreement
from megatron_dip.runtime.plan_service import ObtainedPlan, PlanService
from megatron_dip.workload import Problem

__all__ = ["PlanAhead"]

# A look-ahead of training and one of evaluation, and some to spare.
_BATCHES_REMEMBERED = 16


@dataclass(kw_only=True, eq=False)
class _Known:
    """A batch of this replica."""

    sizes: BatchSizes
    problem: Problem
    is_gathered: bool = False
    """Whether the owner has been told of it."""
    batch: Batch | None = None
    """On the owner: what the plan is made for, the batches of all replicas that share it."""


class PlanAhead:
    """What one rank does to have a plan when a step begins.

    A rank that has data asks for plans of its own batches; one that has none gets what the others
    run, with the sizes of its items.  The leaders of replicas have data.

    Args:
        builder: Of problems, with the costs of the day.
        agreement: With the other ranks that run the plan.
        service: On the plan owner; None elsewhere.
    """

    def __init__(
        self,
        builder: Callable[[], ProblemBuilder],
        agreement: PlanAgreement,
        service: PlanService | None,
    ) -> None:
        assert (service is not None) == agreement.is_owner
        self.service = service
        self._builder = builder
        self._agreement = agreement
        self._known: deque[_Known] = deque(maxlen=_BATCHES_REMEMBERED)
        self._offered: dict[tuple[str, ...], ObtainedPlan] = {}
        self.last_obtained: ObtainedPlan | None = None
        """Where the last plan came from; on the plan owner, None where a step was run again."""

    def summary(self) -> dict[str, str | float]:
        """Where the last plan came from, for records of a run; empty where that is not known."""
        return {} if self.last_obtained is None else self.last_obtained.summary()

    def note_step(self) -> None:
        """A training step begins."""
        if self.service is not None:
            self.service.note_step()

    def request(self, coming: Sequence[BatchSizes]) -> None:
        """Have the batches planned that come next, in this order; on all ranks with data."""
        known = [self._find(sizes) for sizes in coming]
        self._gather([one for one in known if not one.is_gathered])
        if self.service is None:
            return
        for one in known:
            if one.batch is not None and one.batch.digests not in self._offered:
                self.service.request(one.batch)

    def offer(self, coming: Sequence[BatchSizes] | None) -> PlannedBatch | None:
        """At the end of every step, on all ranks: pass on the plan of the next batch, if any.

        Args:
            coming: The batches that come next, as far as they are known; None without data.

        Returns:
            It, where it is here already: most likely what will be run next.
        """
        following = self._find(coming[0]) if coming else None
        packed = b""
        if self.service is not None and following is not None and following.batch is not None:
            obtained = self.service.take_ready(following.batch)
            if obtained is not None:
                packed = obtained.packed
                self._offered[following.batch.digests] = obtained
        self._agreement.offer(packed)
        if following is None and coming is not None:
            return None
        own = None if following is None else following.sizes
        return self._agreement.prepare(own, self._build)

    def plan(self, sizes: BatchSizes | None) -> PlannedBatch:
        """The plan for the next batch, the same on all ranks.

        Args:
            sizes: Of its items; None without data.

        Raises:
            PlanDigestError: As :meth:`PlanAgreement.agree`, and
            PlanningError: so, and
            ChannelError: so.
        """
        self.last_obtained = None
        if sizes is None:
            return self._agreement.agree(None, self._build, _nothing)
        known = self._find(sizes)
        if not known.is_gathered:
            self._gather([known])
        if known.batch is not None:
            self.last_obtained = self._offered.pop(known.batch.digests, None)

        def obtain() -> bytes:
            assert self.service is not None, "the owner alone makes plans"
            if known.batch is None:
                raise PlanningError(
                    "the replicas that share experts hold different numbers of batches"
                )
            self.last_obtained = self.service.obtain(known.batch)
            return self.last_obtained.packed

        return self._agreement.agree(known.sizes, self._build, obtain)

    def _build(self, sizes: BatchSizes) -> Problem:
        return self._find(sizes).problem

    def _find(self, sizes: BatchSizes) -> _Known:
        """The same object for the same data, which is how a step that is run again is known."""
        for known in self._known:
            if len(known.sizes) == len(sizes) and all(
                one is other for one, other in zip(known.sizes, sizes, strict=True)
            ):
                return known
        known = _Known(sizes=sizes, problem=self._builder().build(sizes))
        self._known.append(known)
        return known

    def _gather(self, batches: Sequence[_Known]) -> None:
        """Tell the owner of batches, so that those of all replicas can be planned together."""
        told = self._agreement.gather([known.sizes for known in batches])
        for known, replicas in zip(batches, told, strict=False):
            known.batch = Batch(replicas=replicas, builder=self._builder())
            if len(replicas) == 1:
                vars(known.batch)["problem"] = known.problem
        for known in batches:
            known.is_gathered = True


def _nothing() -> bytes:
    raise PlanningError("the rank that makes plans has no data (expected it to read the batches)")
