"""The published operating point: which batches are planned, on which machine, cut how."""

from functools import cache
from pathlib import Path

from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.machine import ClusterConfig, cluster_builder, load_cluster
from megatron_dip.costs.mixtures import Workload, built_in_mixture, draw_microbatches
from megatron_dip.costs.shapes import ModelShape, load_model
from megatron_dip.partition import Partition, load_partition
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.sub_microbatches import TokenLimit, form_sub_microbatches
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.workload import Problem

from .cuts import rule_partition

__all__ = [
    "NUM_MICROBATCHES",
    "ROOT",
    "batch_of",
    "builder_of",
    "chosen_partition_of",
    "cluster_of",
    "mixture_of",
    "partition_of",
    "preset_builder_of",
    "sample_batches",
    "shape_of",
    "table_of",
]

ROOT = Path(__file__).parents[2]
NUM_MICROBATCHES = 64
"""Of an iteration, as published."""
_NUM_GPUS = {"vlm_s": 16, "vlm_m": 32, "vlm_l": 64, "t2v_s": 16, "t2v_l": 64}


def shape_of(model: str) -> ModelShape:
    """At the published dimensions."""
    return load_model(ROOT / "configs" / "models" / f"{model}.yaml")


def cluster_of(name: str) -> ClusterConfig:
    """One of ``configs/clusters``."""
    return load_cluster(ROOT / "configs" / "clusters" / f"{name}.yaml")


def mixture_of(model: str) -> Workload:
    """The published data of a vision-language or a text-to-video model."""
    return built_in_mixture("dip-vlm" if model.startswith("vlm") else "dip-t2v")


@cache
def builder_of(model: str) -> ProblemBuilder:
    """Half of the peak at every size, only operations take time: for comparing schedules."""
    return cluster_builder(shape_of(model), cluster_of(f"h100_{_NUM_GPUS[model]}_half_peak"))


@cache
def preset_builder_of(model: str) -> ProblemBuilder:
    """With rates that grow with the size of a kernel, memory traffic and collectives."""
    return cluster_builder(shape_of(model), cluster_of(f"h100_{_NUM_GPUS[model]}"))


def batch_of(
    model: str,
    seed: int,
    num_microbatches: int = NUM_MICROBATCHES,
    builder: ProblemBuilder | None = None,
) -> Problem:
    """A batch of the published mixture, at the plain rates unless another builder is given."""
    drawn = draw_microbatches(mixture_of(model), num_microbatches, seed)
    return (builder or builder_of(model)).build(drawn)


def sample_batches(model: str, num_microbatches: int = NUM_MICROBATCHES) -> list[Problem]:
    """What cuts are made for; no experiment is judged on them."""
    return [batch_of(model, seed, num_microbatches) for seed in (1, 2)]


@cache
def partition_of(model: str) -> Partition:
    """The cut by the paper's rule for the sample batches."""
    return rule_partition(sample_batches(model))


def chosen_partition_of(model: str) -> Partition:
    """The kept partition, which the partitioner has chosen for batches of the same kind."""
    return load_partition(ROOT / "configs" / "partitions" / f"{model}.json")


def table_of(
    problem: Problem, partition: Partition, max_tokens: dict[str, TokenLimit] | None = None
) -> TaskTable:
    """What the planner computes on, with other sizes of sub-microbatches if given."""
    sizes: dict[str, TokenLimit] = {**partition.sub_microbatch_tokens, **(max_tokens or {})}
    groups = form_sub_microbatches(problem, sizes)
    return build_task_table(PipelineGraph(problem, partition, groups))
