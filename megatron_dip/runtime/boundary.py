"""Shapes of what crosses stage boundaries, as rules over the tokens that a plan names.

Ranks never exchange shapes: sender and receiver apply the same rule to the same plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_dip.plan import Message, PipelineGraph, Work
from megatron_dip.workload import SubMicrobatch

__all__ = ["BoundaryRule", "BoundaryRules", "MessageShapes"]


@dataclass(frozen=True, kw_only=True)
class BoundaryRule:
    """Rows of one token each, shaped [rows, 1, width], and what is carried along below them."""

    width: int
    dtype: torch.dtype
    tokens_per_row: int | None = 1
    """Patches that a merge joins into one row; None where tokens have no rows."""
    num_shards: int = 1
    """Tensor-parallel ranks that share the rows (sequence parallelism); rows are padded to fit."""

    carried: str | None = None
    """The upstream module whose rows go along to every later stage, whole on every rank."""
    rows_per_item: int = 0
    """Further rows that go along for every item, whole on every rank."""

    def shape(
        self, num_tokens: int, num_items: int = 0, carried_tokens: int = 0
    ) -> tuple[int, int, int]:
        rows = 0 if self.tokens_per_row is None else -(-num_tokens // self.tokens_per_row)
        own = -(-rows // self.num_shards)
        return (own + carried_tokens + self.rows_per_item * num_items, 1, self.width)


@dataclass(frozen=True, kw_only=True)
class BoundaryRules:
    """The boundary between stages of each module, and of each module to those that read it."""

    inner: Mapping[str, BoundaryRule]
    outer: Mapping[str, BoundaryRule]


class MessageShapes:
    """Shapes and types of the messages of one batch, from the tokens of what they carry."""

    def __init__(self, graph: PipelineGraph, rules: BoundaryRules) -> None:
        self._graph = graph
        self._rules = rules
        self._known: dict[tuple[SubMicrobatch, bool], tuple[tuple[int, ...], torch.dtype]] = {}

    def of(self, message: Message) -> tuple[tuple[int, ...], torch.dtype]:
        """The same for an output and for its gradient, and between all stages of a module."""
        graph = self._graph
        sub = graph.sub_microbatch(Work(message.upstream_stage, message.microbatch, message.sub))
        source, target = graph.partition[message.source], graph.partition[message.target]
        key = (sub, source.module == target.module)
        if key not in self._known:
            self._known[key] = self._shape(*key)
        return self._known[key]

    def _shape(self, sub: SubMicrobatch, is_inner: bool) -> tuple[tuple[int, ...], torch.dtype]:
        rule = (self._rules.inner if is_inner else self._rules.outer)[sub.module]
        problem = self._graph.problem
        items = [problem.item(sub.module, sub.microbatch, number) for number in sub.items]
        carried_tokens = 0
        if rule.carried is not None:
            carried_tokens = sum(
                problem.item(rule.carried, sub.microbatch, number).tokens
                for item in items
                for number in problem.needed_items(sub.module, sub.microbatch, item, rule.carried)
            )
        num_tokens = sum(item.tokens for item in items)
        return rule.shape(num_tokens, len(items), carried_tokens), rule.dtype
