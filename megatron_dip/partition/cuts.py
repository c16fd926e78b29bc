"""Cuts: layers per module, segment and rank, and the changes that lead from one to another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_dip.partition.stages import Partition
from megatron_dip.partition.uniform import partition_from_layers
from megatron_dip.workload import Item, Problem

__all__ = ["Cut", "Layers", "balanced_layers", "neighbours"]

Layers = tuple[tuple[int, ...], ...]
"""Layers of one module, per segment and rank."""

_KINDS = ("forward_us", "input_grad_us", "weight_grad_us")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where every module's layers are, and how finely its data is split."""

    layers: Mapping[str, Layers]
    sub_microbatch_tokens: Mapping[str, int | None]
    """None: not split."""

    def partition(self) -> Partition:
        """The form that files carry."""
        num_ranks = len(next(iter(self.layers.values()))[0])
        sizes = {name: size for name, size in self.sub_microbatch_tokens.items() if size}
        made = partition_from_layers(self.layers, num_ranks)
        return made.model_copy(update={"sub_microbatch_tokens": sizes})

    def with_layers(self, module: str, layers: Layers) -> "Cut":
        return replace(self, layers={**self.layers, module: layers})

    def with_tokens(self, module: str, tokens: int | None) -> "Cut":
        sizes = {**self.sub_microbatch_tokens, module: tokens}
        return replace(self, sub_microbatch_tokens=sizes)

    @property
    def name(self) -> str:
        """Equal cuts have equal names."""
        return repr((sorted(self.layers.items()), sorted(self.sub_microbatch_tokens.items())))


def balanced_layers(problems: Sequence[Problem], module: str, num_segments: int) -> Layers:
    """Every rank has about the same work of ``module``, what sits before and after it included.

    Layers are shared out one by one to the rank that has least, then over the segments as evenly
    as they can be.
    """
    num_ranks = problems[0].num_ranks
    items = [
        item
        for problem in problems
        for number in range(problem.num_microbatches)
        for item in problem.items(module, number)
    ]
    layer_us = sum(_time_us(item) for item in items)
    load_us = [0.0] * num_ranks
    load_us[0] += sum(_time_us(item, "first_extra_") for item in items)
    load_us[-1] += sum(_time_us(item, "last_extra_") for item in items)
    counts = [0] * num_ranks
    for _ in range(problems[0].module(module).num_layers):
        rank = min(range(num_ranks), key=lambda rank: (load_us[rank], counts[rank], rank))
        load_us[rank] += layer_us
        counts[rank] += 1
    return _spread(counts, num_segments)


def neighbours(cut: Cut) -> Iterator[Cut]:
    """Cuts that differ in the place of one layer, or of one layer per rank."""
    for module, layers in cut.layers.items():
        num_segments, num_ranks = len(layers), len(layers[0])
        counts = [sum(segment[rank] for segment in layers) for rank in range(num_ranks)]
        for source in range(num_ranks):
            for target in range(num_ranks):
                if source != target and counts[source]:
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    yield cut.with_layers(module, _move_rank(layers, source, target))
        for source in range(num_segments):
            for target in range(num_segments):
                if source != target and all(layers[source]):
                    rows = [list(row) for row in layers]
                    for rank in range(num_ranks):
                        rows[source][rank] -= 1
                        rows[target][rank] += 1
                    yield cut.with_layers(module, tuple(tuple(row) for row in rows))


def _move_rank(layers: Layers, source: int, target: int) -> Layers:
    """One layer goes from a rank to another: from its fullest segment to the emptiest."""
    rows = [list(row) for row in layers]
    full = max(range(len(rows)), key=lambda segment: (rows[segment][source], segment))
    empty = min(range(len(rows)), key=lambda segment: (rows[segment][target], segment))
    rows[full][source] -= 1
    rows[empty][target] += 1
    return tuple(tuple(row) for row in rows)


def _spread(counts: Sequence[int], num_segments: int) -> Layers:
    return tuple(
        tuple(count // num_segments + (segment < count % num_segments) for count in counts)
        for segment in range(num_segments)
    )


def _time_us(item: Item, part: str = "") -> float:
    """Forward and backward of an item in one layer, or in the extras that ``part`` names."""
    return sum(getattr(item, part + kind) for kind in _KINDS)
