"""The paper's own rule for a cut.

Every module by itself in K segments that span all ranks: one for the module that is passed fastest,
floor(T / T_fastest) for the others, T being the mean time of a sub-microbatch in all of its layers.
"""

from collections.abc import Sequence

from megatron_dip.partition import Partition
from megatron_dip.partitioner.cuts import Cut, balanced_counts, spread_layers
from megatron_dip.workload import Item, Problem

__all__ = ["IMAGE_PATCHES", "PUBLISHED_IMAGES", "rule_partition"]

IMAGE_PATCHES = 2704
PUBLISHED_IMAGES = 12
"""Of a sub-microbatch, the best size that was published."""


def rule_partition(problems: Sequence[Problem], images: int = PUBLISHED_IMAGES) -> Partition:
    """The cut that the rule makes for batches like ``problems``.

    Args:
        problems: Batches of one model.
        images: Of a sub-microbatch of the module ``vision``; others are not split.
    """
    names = problems[0].module_order
    tokens = {name: images * IMAGE_PATCHES if name == "vision" else None for name in names}
    times_us = {name: _passage_us(problems, name, tokens[name]) for name in names}
    fastest_us = min(times_us.values())
    counts = balanced_counts(problems, is_joint=False)
    layers = {}
    for name, time_us in times_us.items():
        most = problems[0].module(name).num_layers // problems[0].num_ranks
        num_segments = min(most, max(1, int(time_us / fastest_us)))
        layers[name] = spread_layers(counts[name], num_segments)
    return Cut(layers=layers, sub_microbatch_tokens=tokens).partition()


def _passage_us(problems: Sequence[Problem], name: str, tokens: int | None) -> float:
    """Mean forward and backward of a sub-microbatch in all layers."""
    module = problems[0].module(name)
    shares = [
        problem.items(name, number)
        for problem in problems
        for number in range(problem.num_microbatches)
        if problem.items(name, number)
    ]
    total_us = sum(_item_us(item) for items in shares for item in items)
    num_groups = sum(
        1 if tokens is None else -(-sum(item.tokens for item in items) // tokens)
        for items in shares
    )
    return module.num_layers * (total_us / num_groups + 2 * module.layer_overhead_us)


def _item_us(item: Item) -> float:
    return item.forward_us + item.input_grad_us + item.weight_grad_us
