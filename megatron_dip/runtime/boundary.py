"""Shapes of what crosses stage boundaries, as rules over the tokens that a plan names.

Ranks never exchange shapes: sender and receiver apply the same rule to the same plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_dip.plan import Message, PipelineGraph, Work

__all__ = ["BoundaryRule", "BoundaryRules", "message_shape"]


@dataclass(frozen=True, kw_only=True)
class BoundaryRule:
    """Rows of one token each, shaped [rows, 1, width]."""

    width: int
    dtype: torch.dtype
    tokens_per_row: int = 1
    """Patches that a merge joins into one row."""
    num_shards: int = 1
    """Tensor-parallel ranks that share the rows (sequence parallelism); rows are padded to fit."""

    def shape(self, num_tokens: int) -> tuple[int, int, int]:
        rows = -(-num_tokens // self.tokens_per_row)
        return (-(-rows // self.num_shards), 1, self.width)


@dataclass(frozen=True, kw_only=True)
class BoundaryRules:
    """The boundary between stages of each module, and of each module to those that read it."""

    inner: Mapping[str, BoundaryRule]
    outer: Mapping[str, BoundaryRule]

    def rule(self, graph: PipelineGraph, message: Message) -> BoundaryRule:
        source, target = graph.partition[message.source], graph.partition[message.target]
        if source.module == target.module:
            return self.inner[source.module]
        return self.outer[graph.partition[message.upstream_stage].module]


def message_shape(
    graph: PipelineGraph, message: Message, rules: BoundaryRules
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of ``message``, from the tokens of its upstream sub-microbatch."""
    work = Work(message.upstream_stage, message.microbatch, message.sub)
    sub_microbatch = graph.sub_microbatch(work)
    num_tokens = sum(
        graph.problem.item(sub_microbatch.module, sub_microbatch.microbatch, number).tokens
        for number in sub_microbatch.items
    )
    rule = rules.rule(graph, message)
    return rule.shape(num_tokens), rule.dtype
