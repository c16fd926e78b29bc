"""Partitions: modules cut into segments, segments into one stage per pipeline rank."""

from megatron_dip.partition.stages import Partition, Stage, load_partition, parse_partition
from megatron_dip.partition.uniform import cut_evenly, partition_from_layers, uniform_partition

__all__ = [
    "Partition",
    "Stage",
    "cut_evenly",
    "load_partition",
    "parse_partition",
    "partition_from_layers",
    "uniform_partition",
]
