"""A batch to be planned: the items of all replicas that share its plan, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_dip.costs import BatchSizes, ProblemBuilder
from megatron_dip.errors import PlanError
from megatron_dip.plan import Plan
from megatron_dip.planner.joint import joint_problem
from megatron_dip.planner.wire import pack_plan, sizes_digest
from megatron_dip.workload import Problem

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one plan is made for."""

    replicas: tuple[BatchSizes, ...]
    builder: ProblemBuilder
    """The costs."""

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Per replica, of its items: what the batch is known by."""
        return tuple(map(sizes_digest, self.replicas))

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
            if module.has_experts:
                _check_alike(problems, module.name)
        return joint_problem(problems)

    def pack(self, plan: Plan) -> bytes:
        """A plan for this batch, to be sent to the ranks of all replicas."""
        return pack_plan(plan, self.replicas)


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
