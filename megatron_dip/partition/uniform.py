"""Partitions made from layer counts: the same number of layers everywhere, or counts as given."""

from collections.abc import Mapping, Sequence

from megatron_dip.errors import PartitionError
from megatron_dip.partition.stages import Partition, Stage

__all__ = ["cut_evenly", "partition_from_layers", "uniform_partition"]


def cut_evenly(num_layers: int, num_segments: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Layers per (segment, rank), as equal as they can be; what is left over goes to the front.

    Raises:
        PartitionError: There are fewer layers than stages.
    """
    num_stages = num_segments * num_ranks
    if num_layers < num_stages:
        raise PartitionError(
            f"{num_layers} layers cannot fill {num_segments} segments on {num_ranks} ranks "
            f"(expected at least {num_stages} layers: use fewer segments)"
        )
    base, extra = divmod(num_layers, num_stages)
    counts = [base + (index < extra) for index in range(num_stages)]
    return tuple(
        tuple(counts[segment * num_ranks : (segment + 1) * num_ranks])
        for segment in range(num_segments)
    )


def partition_from_layers(
    layers: Mapping[str, Sequence[Sequence[int]]], num_ranks: int
) -> Partition:
    """The partition with ``layers[module][segment][rank]`` layers in each stage.

    Modules are numbered in the order given; stages without layers are left out except a module's
    first and last.

    Raises:
        PartitionError: A segment does not name one count per rank.
    """
    stages: list[Stage] = []
    for module, segments in layers.items():
        next_layer = 0
        for segment, counts in enumerate(segments):
            if len(counts) != num_ranks:
                raise PartitionError(
                    f"module {module}, segment {segment}: {len(counts)} layer counts for "
                    f"{num_ranks} ranks (expected one per rank)"
                )
            for rank, num_layers in enumerate(counts):
                is_first = segment == 0 and rank == 0
                is_last = segment == len(segments) - 1 and rank == num_ranks - 1
                if num_layers or is_first or is_last:
                    stages.append(
                        Stage(
                            stage=len(stages),
                            module=module,
                            segment=segment,
                            rank=rank,
                            first_layer=next_layer,
                            num_layers=num_layers,
                        )
                    )
                next_layer += num_layers
    return Partition(stages=tuple(stages))


def uniform_partition(
    num_layers: Mapping[str, int], num_segments: Mapping[str, int], num_ranks: int
) -> Partition:
    """Every module cut evenly into its number of segments; see :func:`cut_evenly`."""
    layers = {
        module: cut_evenly(count, num_segments[module], num_ranks)
        for module, count in num_layers.items()
    }
    return partition_from_layers(layers, num_ranks)
