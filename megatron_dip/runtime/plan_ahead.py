"""Plans made ahead of their steps, on one rank: the plan service and the agreement together."""

from collections import deque
from collections.abc import Callable, Sequence

from megatron_dip.costs import ItemSizes
from megatron_dip.plan import Plan
from megatron_dip.runtime.agreement import PlanAgreement
from megatron_dip.runtime.plan_service import Batch, ObtainedPlan, PlanService

__all__ = ["PlanAhead"]

BatchSizes = tuple[ItemSizes, ...]

# A look-ahead of training and one of evaluation, and some to spare.
_BATCHES_REMEMBERED = 16


class PlanAhead:
    """What one rank does to have a plan when a step begins.

    Args:
        build: A batch from the sizes of its items, with the costs of the day.
        agreement: With the other ranks of the pipeline.
        service: On the plan owner; None elsewhere.
    """

    def __init__(
        self,
        build: Callable[[BatchSizes], Batch],
        agreement: PlanAgreement,
        service: PlanService | None,
    ) -> None:
        assert (service is not None) == agreement.is_owner
        self.service = service
        self._build = build
        self._agreement = agreement
        self._batches: deque[tuple[BatchSizes, Batch]] = deque(maxlen=_BATCHES_REMEMBERED)
        self._offered: dict[str, ObtainedPlan] = {}
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
        """Have the batches planned that come next, in this order."""
        if self.service is not None:
            for batch in map(self._batch, coming):
                if batch.digest not in self._offered:
                    self.service.request(batch)

    def offer(self, coming: Sequence[BatchSizes]) -> None:
        """At the end of every step, on all ranks: pass on the plan of the next batch, if any."""
        following = self._batch(coming[0]) if coming else None
        packed = b""
        if self.service is not None and following is not None:
            obtained = self.service.take_ready(following)
            if obtained is not None:
                packed = obtained.packed
                self._offered[following.digest] = obtained
        self._agreement.offer(packed)
        if following is not None:
            self._agreement.prepare(following.problem)

    def plan(self, sizes: BatchSizes) -> Plan:
        """The plan for a batch, the same on all ranks.

        Raises:
            PlanDigestError: As :meth:`PlanAgreement.agree`, and
            PlanningError: so, and
            ChannelError: so.
        """
        batch = self._batch(sizes)
        self.last_obtained = self._offered.pop(batch.digest, None)

        def obtain() -> bytes:
            assert self.service is not None, "the owner alone makes plans"
            self.last_obtained = self.service.obtain(batch)
            return self.last_obtained.packed

        return self._agreement.agree(batch.problem, obtain)

    def _batch(self, sizes: BatchSizes) -> Batch:
        """The same object for the same data, which is how a step that is run again is known."""
        for known, batch in self._batches:
            if len(known) == len(sizes) and all(
                one is other for one, other in zip(known, sizes, strict=True)
            ):
                return batch
        batch = self._build(sizes)
        self._batches.append((sizes, batch))
        return batch
