"""A batch to be planned: the items of all replicas that share its plan, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_dip.costs import ItemSizes, ProblemBuilder
from megatron_dip.errors import PlanError
from megatron_dip.plan import Plan, pack_plan
from megatron_dip.planner.joint import joint_problem
from megatron_dip.workload import Problem

__all__ = ["Batch", "BatchSizes"]

BatchSizes = tuple[ItemSizes, ...]
"""The items of every microbatch of one replica."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one plan is made for."""

    replicas: tuple[BatchSizes, ...]
    problem: Problem
    """Of all replicas together."""
    digests: tuple[str, ...]
    """Per replica, of its items: the same on all ranks that read the same data."""

    @classmethod
    def of(cls, builder: ProblemBuilder, replicas: Sequence[BatchSizes]) -> Self:
        """The batch at the costs of ``builder``.

        Raises:
            ProblemError: A microbatch names a module that the model does not have.
            PlanError: The replicas cannot share a plan.
        """
        problems = [builder.build(microbatches) for microbatches in replicas]
        for module in builder.model.modules:
            if module.experts is not None:
                _check_alike(problems, module.name)
        return cls(
            replicas=tuple(replicas),
            problem=joint_problem(problems) if len(problems) > 1 else problems[0],
            digests=tuple(problem.batch_digest() for problem in problems),
        )

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
