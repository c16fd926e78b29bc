"""Batches to be planned, of all replicas that share a plan, and planned ones, of one replica."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_dip.costs import BatchSizes, ItemSize, ProblemBuilder
from megatron_dip.errors import PlanError
from megatron_dip.plan import Plan, pack_plan
from megatron_dip.planner.joint import joint_problem
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["Batch", "PlannedBatch"]


class PlannedBatch(NamedTuple):
    """What the ranks of one replica run: a plan, and the sizes of the items that it is for."""

    plan: Plan
    sizes: BatchSizes | None = None
    """None where nothing but the tokens of items is known, as in a rehearsal."""

    def sizes_of(self, sub: SubMicrobatch) -> tuple[ItemSize, ...]:
        """Of the items of a sub-microbatch, in their order."""
        if self.sizes is not None:
            known = self.sizes[sub.microbatch][sub.module]
            return tuple(known[item] for item in sub.items)
        problem = self.plan.problem
        tokens = [problem.item(sub.module, sub.microbatch, item).tokens for item in sub.items]
        return tuple(ItemSize(tokens=number, spans=(number,)) for number in tokens)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one plan is made for."""

    replicas: tuple[BatchSizes, ...]
    digests: tuple[str, ...]
    """Per replica, of its items: the same on all ranks that read the same data."""
    builder: ProblemBuilder
    """The costs."""

    @cached_property
    def problem(self) -> Problem:
        """Of all replicas together; made when it is asked for, because planner processes do it.

        Raises:
            ProblemError: A microbatch names a module that the model does not have.
            PlanError: The replicas cannot share a plan.
        """
        problems = [self.builder.build(microbatches) for microbatches in self.replicas]
        if len(problems) == 1:
            return problems[0]
        for module in self.builder.model.modules:
            if module.experts is not None:
                _check_alike(problems, module.name)
        return joint_problem(problems)

    def pack(self, plan: Plan) -> bytes:
        """A plan for this batch, to be sent to the ranks of all replicas."""
        return pack_plan(plan, self.digests)


def _check_alike(problems: Sequence[Problem], module: str) -> None:
    """Check that the layers with experts have the same works in all replicas, which meet in them.

    Raises:
        PlanError: A replica has another number of items, with which it would run alone.
    """
    for number, microbatches in enumerate(zip(*(p.microbatches for p in problems), strict=False)):
        counts = [len(microbatch.get(module, ())) for microbatch in microbatches]
        if len(set(counts)) > 1:
            raise PlanError(
                f"replicas that share experts have {counts} {module} items in microbatch {number} "
                f"(expected equal numbers: their layers exchange tokens)"
            )
