"""Planned batches: what the ranks of one replica run."""

from typing import NamedTuple

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.plan import Plan
from megatron_dip.workload import SubMicrobatch

__all__ = ["PlannedBatch"]


class PlannedBatch(NamedTuple):
    """A plan, and the sizes of the items that it is for."""

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

    def num_loss_tokens(self, module: str, microbatch: int) -> int:
        """Of all items of a module in a microbatch."""
        items = tuple(item.item for item in self.plan.problem.items(module, microbatch))
        whole = self.sizes_of(SubMicrobatch(module, microbatch, 0, items))
        return sum(size.loss_tokens for size in whole)
