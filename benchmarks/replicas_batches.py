"""Batches of many replicas as sizes of samples, of which only some are made problems."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from megatron_dip.assignment import Groups, assign, item_kept_bytes
from megatron_dip.costs import ItemSize, cluster_builder, load_cluster, load_model
from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.mixtures import LanguageItems, built_in_mixture, draw_microbatches
from megatron_dip.simulator.bounds import item_work_us
from megatron_dip.workload import Problem

__all__ = ["Batches"]

MICROBATCHES = 64
NUM_SPREAD, NUM_HEAVIEST = 12, 4
"""Of the replicas, how many are run."""


class Sample(NamedTuple):
    """An item of the last module with what it reads, the items of other modules."""

    upstream: tuple[tuple[str, tuple[ItemSize, ...]], ...]
    item: ItemSize

    def sizes(self, name: str) -> list[tuple[str, ItemSize]]:
        """Of all its items, with their modules; ``name`` is the last one."""
        return [(name, self.item), *((n, size) for n, many in self.upstream for size in many)]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A batch per replica."""

    builder: ProblemBuilder
    samples: tuple[Sample, ...]
    groups: Groups
    """The same samples, with their costs."""
    replica: np.ndarray
    microbatch: np.ndarray
    num_replicas: int
    num_microbatches: int = MICROBATCHES
    """Of a replica."""
    within: bool = False
    """Whether microbatches of a replica are evened out where it is made a problem: replicas do
    not depend on one another in that."""
    moved: dict[str, Any] | None = None
    """To other replicas."""

    @classmethod
    def draw(
        cls,
        root: Path,
        model: str,
        cluster: str,
        seeds: Sequence[int],
        *,
        num_microbatches: int = MICROBATCHES,
        whole_sequences: bool = False,
    ) -> Self:
        """As at the published point, a seed per replica.

        Args:
            whole_sequences: Samples of a packed sequence stay together: one item.
        """
        builder = cluster_builder(
            load_model(root / f"configs/models/{model}.yaml"),
            load_cluster(root / f"configs/clusters/{cluster}.yaml"),
        )
        is_packed = model.startswith("vlm")
        workload = built_in_mixture("dip-vlm" if is_packed else "dip-t2v")
        are_apart = is_packed and not whole_sequences
        items: LanguageItems = "samples" if are_apart else "sequences"
        last = builder.model.modules[-1].name
        samples, places = [], []
        for replica, seed in enumerate(seeds):
            drawn = draw_microbatches(workload, num_microbatches, seed, items)
            for microbatch, sizes in enumerate(drawn):
                for item in sizes[last]:
                    upstream = tuple(
                        (name, tuple(sizes[name][number] for number in numbers))
                        for name, numbers in item.needs.items()
                    )
                    samples.append(Sample(upstream, item))
                    places.append((replica, microbatch))
        replica, microbatch = np.array(places, dtype=np.int64).T
        return cls(
            builder=builder,
            samples=tuple(samples),
            groups=_groups(builder, samples, replica, microbatch),
            replica=replica,
            microbatch=microbatch,
            num_replicas=len(seeds),
            num_microbatches=num_microbatches,
        )

    def first(self, num_replicas: int) -> Self:
        """The first replicas alone."""
        kept = np.flatnonzero(self.replica < num_replicas)
        return replace(
            self,
            samples=tuple(self.samples[index] for index in kept),
            groups=_part(self.groups, kept),
            replica=self.replica[kept],
            microbatch=self.microbatch[kept],
            num_replicas=num_replicas,
        )

    def assigned(self, *, within: bool) -> Self:
        """Evened out between replicas and, with ``within``, between microbatches."""
        made = assign(self.groups, [self.num_microbatches] * self.num_replicas, within=False)
        return replace(
            self,
            replica=made.replica,
            microbatch=made.microbatch,
            within=within,
            moved=made.between._asdict() | {"of_groups": len(self.samples)},
        )

    @cached_property
    def work_us(self) -> np.ndarray:
        """[replicas]"""
        return np.bincount(
            self.replica, self.groups.time_us.sum(axis=1), minlength=self.num_replicas
        )

    @cached_property
    def spread(self) -> list[int]:
        """Replicas from the one with most work to that with least, at even distances."""
        places = np.linspace(0, self.num_replicas - 1, min(self.num_replicas, NUM_SPREAD))
        return self._by_work[places.round().astype(np.int64)].tolist()

    @cached_property
    def to_run(self) -> list[int]:
        """Those that stand for all: what is spread, whose mean is about that of all, then more of
        those with most work."""
        return list(dict.fromkeys((*self.spread, *self.heaviest)))

    @property
    def heaviest(self) -> list[int]:
        """Replicas with most work."""
        return self._by_work[:NUM_HEAVIEST].tolist()

    @property
    def _by_work(self) -> np.ndarray:
        """[replicas], most first."""
        return np.argsort(-self.work_us, kind="stable")

    def problem(self, replica: int) -> Problem:
        """The batch of one replica."""
        return self.builder.build(self.contents(replica))

    def contents(self, replica: int) -> list[dict[str, list[ItemSize]]]:
        """The same as sizes: per microbatch and module."""
        own = np.flatnonzero(self.replica == replica)
        microbatch = self.microbatch[own]
        if self.within:
            here = replace(
                _part(self.groups, own), replica=np.zeros_like(own), microbatch=microbatch
            )
            microbatch = assign(here, [self.num_microbatches]).microbatch
        contents: list[dict[str, list[ItemSize]]] = [{} for _ in range(self.num_microbatches)]
        last = self.builder.model.modules[-1].name
        for index, number in zip(own.tolist(), microbatch.tolist(), strict=True):
            content, sample = contents[number], self.samples[index]
            needs = {}
            for name, sizes in sample.upstream:
                items = content.setdefault(name, [])
                needs[name] = tuple(range(len(items), len(items) + len(sizes)))
                items += sizes
            content.setdefault(last, []).append(replace(sample.item, needs=needs))
        return contents


def _part(groups: Groups, kept: np.ndarray) -> Groups:
    return Groups(**{name: values[kept] for name, values in vars(groups).items()})


def _groups(
    builder: ProblemBuilder, samples: Sequence[Sample], replica: np.ndarray, microbatch: np.ndarray
) -> Groups:
    """Costs of samples: items of one size cost the same."""
    names = [module.name for module in builder.model.modules]
    sizes: dict[str, dict[tuple[object, ...], tuple[int, ItemSize]]] = {name: {} for name in names}
    counts = []
    for sample in samples:
        known = []
        for name, size in sample.sizes(names[-1]):
            key = (size.tokens, size.spans, size.context_tokens, size.output_tokens)
            number, _ = sizes[name].setdefault(key, (len(sizes[name]), size))
            known.append((name, number))
        counts.append(known)
    alone = {name: [replace(size, needs={}) for _, size in sizes[name].values()] for name in names}
    everything = builder.build([alone])
    work = {name: item_work_us(everything, name) for name in names}
    kept = {name: item_kept_bytes(everything, name) for name in names}
    costs = {
        (name, item.item): (work[name](item), item.tokens, kept[name](item), item.boundary_bytes)
        for name in names
        for item in everything.items(name, 0)
    }
    time_us = np.zeros((len(samples), len(names)))
    tokens = np.zeros((len(samples), len(names)), dtype=np.int64)
    totals = np.zeros((len(samples), 3), dtype=np.int64)
    for row, known in enumerate(counts):
        for name, number in known:
            item_us, item_tokens, item_kept, item_moved = costs[name, number]
            time_us[row, names.index(name)] += item_us
            tokens[row, names.index(name)] += item_tokens
            totals[row] += (item_kept, item_moved, 1)
    return Groups(
        time_us=time_us,
        tokens=tokens,
        kept_bytes=totals[:, 0],
        moved_bytes=totals[:, 1],
        num_items=totals[:, 2],
        replica=replica,
        microbatch=microbatch,
    )
