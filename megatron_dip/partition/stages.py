"""The partition form: which layers of which module sit in which stage on which rank.

A *segment* is a run of a module's layers spread once over all ranks, one stage per rank.  Layers
of a module are contiguous in the order (segment, rank).  A stage without layers is not listed and
the chain goes past its rank; only a module's first stage (segment 0, rank 0) and last stage (last
segment, last rank) always exist, because they carry embedding and head.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.errors import PartitionError
from megatron_dip.forms import Form
from megatron_dip.limits import Count, Layer, Rank
from megatron_dip.reading import read_json
from megatron_dip.workload import Problem

__all__ = ["Partition", "Stage", "load_partition", "parse_partition"]

SizePerModule = dict[str, Annotated[int, Field(ge=1, le=2**53)]]


class Stage(Form):
    """The layers of one segment on one rank."""

    stage: Count
    """Global number, unique over all modules."""
    module: str
    segment: Layer
    rank: Rank
    first_layer: Layer
    num_layers: Layer

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


class Partition(Form):
    """All stages of all modules, and how finely their data is to be split."""

    format: Literal["megatron-dip/partition"] = "megatron-dip/partition"
    version: Literal[1] = 1
    stages: tuple[Stage, ...]
    sub_microbatch_tokens: SizePerModule = Field(default={}, exclude_if=lambda sizes: not sizes)
    """Most tokens in a sub-microbatch; a module that is not named is not split."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        numbers = [stage.stage for stage in self.stages]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"stages: numbers repeat: {sorted(numbers)}")
        for name, chain in self.chains.items():
            _check_chain(name, chain)
        unknown = sorted(set(self.sub_microbatch_tokens) - set(self.chains))
        if unknown:
            raise ValueError(
                f"sub_microbatch_tokens: modules {unknown} have no stages (expected some of "
                f"{sorted(self.chains)})"
            )
        return self

    @cached_property
    def by_number(self) -> dict[int, Stage]:
        return {stage.stage: stage for stage in self.stages}

    @cached_property
    def chains(self) -> dict[str, tuple[Stage, ...]]:
        """Stages of every module in the order in which data passes them."""
        chains: dict[str, list[Stage]] = {}
        for stage in sorted(self.stages, key=lambda stage: (stage.segment, stage.rank)):
            chains.setdefault(stage.module, []).append(stage)
        return {name: tuple(chain) for name, chain in chains.items()}

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {
            stage.stage: position
            for chain in self.chains.values()
            for position, stage in enumerate(chain)
        }

    def __getitem__(self, number: int) -> Stage:
        return self.by_number[number]

    def first_stage(self, module: str) -> Stage:
        return self.chains[module][0]

    def last_stage(self, module: str) -> Stage:
        return self.chains[module][-1]

    def previous_stage(self, number: int) -> Stage | None:
        """The stage of the same module that feeds this one; None for its first stage."""
        position = self._positions[number]
        return self.chains[self[number].module][position - 1] if position else None

    def next_stage(self, number: int) -> Stage | None:
        """The stage of the same module that this one feeds; None for its last stage."""
        chain = self.chains[self[number].module]
        position = self._positions[number] + 1
        return chain[position] if position < len(chain) else None

    def stages_on(self, rank: int) -> tuple[Stage, ...]:
        """Stages of one rank, in order of their numbers."""
        return tuple(
            self.by_number[number]
            for number in sorted(self.by_number)
            if self.by_number[number].rank == rank
        )

    def check_covers(self, problem: Problem) -> None:
        """Raise PartitionError unless every layer of every module sits in exactly one stage."""
        num_layers = {module.name: module.num_layers for module in problem.modules}
        self.check_layers(num_layers, problem.num_ranks)

    def check_layers(self, num_layers: Mapping[str, int], num_ranks: int) -> None:
        """As :meth:`check_covers`, for modules with so many layers on ``num_ranks`` ranks.

        Raises:
            PartitionError: A module is missing or unknown, its layers are not all covered, or a
                first or last stage is not on the first or last rank.
        """
        if set(self.chains) != set(num_layers):
            raise PartitionError(
                f"partition has stages of {sorted(self.chains)} (expected {sorted(num_layers)})"
            )
        for module, expected in num_layers.items():
            chain = self.chains[module]
            held = sum(stage.num_layers for stage in chain)
            if held != expected:
                raise PartitionError(
                    f"module {module}: stages hold {held} layers (expected {expected})"
                )
            if chain[0].rank != 0 or chain[0].segment != 0 or chain[-1].rank != num_ranks - 1:
                raise PartitionError(
                    f"module {module}: first stage on segment {chain[0].segment} rank "
                    f"{chain[0].rank}, last on rank {chain[-1].rank} (expected segment 0 rank 0 "
                    f"and rank {num_ranks - 1}; list them even without layers)"
                )
            beyond = [stage.stage for stage in chain if stage.rank >= num_ranks]
            if beyond:
                raise PartitionError(f"stages {beyond} are on ranks beyond {num_ranks - 1}")

    def check_ranks(self, num_ranks: int) -> None:
        """Refuse a partition that leaves one of ``num_ranks`` ranks without any stage.

        Such a partition can be planned and simulated, but a run has nothing to build there.

        Raises:
            PartitionError: Names the ranks.
        """
        idle = sorted(set(range(num_ranks)) - {stage.rank for stage in self.stages})
        if idle:
            num_layers = sum(stage.num_layers for stage in self.stages)
            raise PartitionError(
                f"ranks {idle} have no stage of any module (expected at least one on each of "
                f"{num_ranks} pipeline ranks: give these ranks some of the {num_layers} layers, "
                f"or use fewer ranks)"
            )


def _check_chain(module: str, chain: tuple[Stage, ...]) -> None:
    places = [(stage.segment, stage.rank) for stage in chain]
    if len(set(places)) != len(places):
        raise ValueError(f"module {module}: two stages share a segment and rank: {places}")
    next_layer = 0
    for stage in chain:
        if stage.first_layer != next_layer:
            raise ValueError(
                f"stage {stage.stage}: first_layer is {stage.first_layer} (expected {next_layer}: "
                f"layers of a module are contiguous in the order segment, rank)"
            )
        next_layer += stage.num_layers
    empty = [stage.stage for stage in chain[1:-1] if stage.num_layers == 0]
    if empty:
        raise ValueError(
            f"module {module}: stages {empty} have no layers (leave them out: only a first or "
            f"last stage may be empty)"
        )


def parse_partition(data: Mapping[str, Any], source: str = "") -> Partition:
    """A partition from parsed JSON.

    Raises:
        PartitionError: A field is missing or unknown, or layers are not contiguous.
    """
    return Partition.parse(data, PartitionError, source)


def load_partition(path: str | Path) -> Partition:
    """The partition in a JSON file; see :func:`parse_partition`."""
    return parse_partition(read_json(path, PartitionError), str(path))
