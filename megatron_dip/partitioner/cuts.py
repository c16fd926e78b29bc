"""Cuts: layers per module, segment and rank, and the changes that lead from one to another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron_dip.partition.stages import Partition
from megatron_dip.partition.uniform import partition_from_layers
from megatron_dip.workload import Item, Problem

__all__ = ["Cut", "Layers", "Path", "balanced_layers", "layers_of", "path_of", "there_and_back"]

Layers = tuple[tuple[int, ...], ...]
"""Layers of one module, per segment and rank."""

Path = tuple[tuple[int, int], ...]
"""The ranks that data of one module visits, one after the other, with the layers that it passes on
each.  Since a segment may have no layers on a rank, a path may visit ranks in any order."""

_KINDS = ("forward_us", "input_grad_us", "weight_grad_us")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where every module's layers are, and how finely its data is split."""

    layers: Mapping[str, Layers]
    sub_microbatch_tokens: Mapping[str, int | None]
    """None: not split."""

    @classmethod
    def of(cls, partition: Partition) -> Self:
        """The cut that a file carries."""
        num_ranks = 1 + max(stage.rank for stage in partition.stages)
        layers = {}
        for module, chain in partition.chains.items():
            rows = [[0] * num_ranks for _ in range(chain[-1].segment + 1)]
            for stage in chain:
                rows[stage.segment][stage.rank] = stage.num_layers
            layers[module] = tuple(map(tuple, rows))
        sizes = {module: partition.sub_microbatch_tokens.get(module) for module in layers}
        return cls(layers=layers, sub_microbatch_tokens=sizes)

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


def path_of(layers: Layers) -> Path:
    """The stages with layers, in the order in which data passes them."""
    return tuple((rank, count) for row in layers for rank, count in enumerate(row) if count)


def layers_of(path: Sequence[tuple[int, int]], num_ranks: int) -> Layers:
    """Segments that lead along ``path``: a new one wherever the rank does not rise."""
    rows: list[list[int]] = []
    last = num_ranks
    for rank, count in path:
        if rank <= last:
            rows.append([0] * num_ranks)
        rows[-1][rank] = count
        last = rank
    return tuple(tuple(row) for row in rows)


def there_and_back(layers: Layers) -> Layers:
    """``layers`` with every other segment from the last rank to the first, like a snake.

    Where it turns nothing is sent, and on every rank some stages are followed by the rank above and
    some by the one below, so that a small item need not stay behind a large one that goes the same
    way (V-shaped layouts of Qi et al., "Pipeline Parallelism with Controllable Memory", arXiv
    2405.15362).
    """
    num_ranks = len(layers[0])
    path: list[tuple[int, int]] = []
    for segment, row in enumerate(layers):
        path += path_of((row,))[:: -1 if segment % 2 else 1]
    return layers_of(path, num_ranks)


def _spread(counts: Sequence[int], num_segments: int) -> Layers:
    return tuple(
        tuple(count // num_segments + (segment < count % num_segments) for count in counts)
        for segment in range(num_segments)
    )


def _time_us(item: Item, part: str = "") -> float:
    """Forward and backward of an item in one layer, or in the extras that ``part`` names."""
    return sum(getattr(item, part + kind) for kind in _KINDS)
