"""Shapes of the messages of a batch, from the sizes of what they carry."""

from typing import Protocol

from megatron_dip.costs import Boundary
from megatron_dip.plan import Message, Work
from megatron_dip.planner import PlannedBatch
from megatron_dip.workload import SubMicrobatch

__all__ = ["BoundaryOf", "MessageShapes"]


class BoundaryOf(Protocol):
    """The boundary of every module, as all ranks know it."""

    def __call__(self, module: str, *, outer: bool) -> Boundary:
        """Between stages of ``module``, or (outer) from its last stage to those that read it."""


class MessageShapes:
    """Shapes of the messages of one batch."""

    def __init__(self, batch: PlannedBatch, boundary: BoundaryOf) -> None:
        self._batch = batch
        self._boundary = boundary
        self._known: dict[tuple[SubMicrobatch, bool], tuple[int, ...]] = {}

    def of(self, message: Message) -> tuple[int, ...]:
        """The same for an output and for its gradient, and between all stages of a module.

        Raises:
            DataError: The items of the message have no common shape.
        """
        graph = self._batch.plan.graph
        sub = graph.sub_microbatch(Work(message.upstream_stage, message.microbatch, message.sub))
        outer = graph.partition[message.source].module != graph.partition[message.target].module
        if (sub, outer) not in self._known:
            sizes = self._batch.sizes_of(sub)
            rule = self._boundary(sub.module, outer=outer)
            self._known[sub, outer] = rule.shape(sizes, outer=outer)
        return self._known[sub, outer]
