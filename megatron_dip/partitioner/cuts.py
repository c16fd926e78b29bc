"""Cuts: layers per module, segment and rank, and the changes that lead from one to another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron_dip.partition.stages import Partition
from megatron_dip.partition.uniform import partition_from_layers
from megatron_dip.workload import Item, Problem

__all__ = [
    "Cut",
    "Layers",
    "Path",
    "balanced_counts",
    "layers_of",
    "path_of",
    "spread_layers",
    "there_and_back",
]

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


def balanced_counts(problems: Sequence[Problem], *, is_joint: bool) -> dict[str, tuple[int, ...]]:
    """Per module, layers of every rank, so that ranks have about the same work of a module.

    What sits before and after a module is counted.  Layers are shared out one by one to the rank
    that has least.

    Args:
        problems: Samples.
        is_joint: Ranks have about the same work of all modules together instead; modules with long
            layers are shared out first, short ones fill up what those leave.
    """
    ranks = range(problems[0].num_ranks)
    layer_us: dict[str, float] = {}
    loads_us: dict[str, list[float]] = {}
    for name in problems[0].module_order:
        items = [
            item
            for problem in problems
            for number in range(problem.num_microbatches)
            for item in problem.items(name, number)
        ]
        layer_us[name] = sum(_time_us(item) for item in items)
        loads_us[name] = [0.0 for _ in ranks]
        loads_us[name][0] += sum(_time_us(item, "first_extra_") for item in items)
        loads_us[name][-1] += sum(_time_us(item, "last_extra_") for item in items)
    shared_us = [sum(load_us[rank] for load_us in loads_us.values()) for rank in ranks]
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(layer_us, key=lambda name: -layer_us[name]):
        load_us = shared_us if is_joint else loads_us[name]
        counts = [0 for _ in ranks]
        for _ in range(problems[0].module(name).num_layers):
            rank = min(ranks, key=lambda rank: (load_us[rank], counts[rank], rank))
            load_us[rank] += layer_us[name]
            counts[rank] += 1
        found[name] = tuple(counts)
    return found


def spread_layers(counts: Sequence[int], num_segments: int) -> Layers:
    """The layers of every rank, over the segments as evenly as they can be."""
    return tuple(
        tuple(count // num_segments + (segment < count % num_segments) for count in counts)
        for segment in range(num_segments)
    )


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


def _time_us(item: Item, part: str = "") -> float:
    """Forward and backward of an item in one layer, or in the extras that ``part`` names."""
    return sum(getattr(item, part + kind) for kind in _KINDS)
