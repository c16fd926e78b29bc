"""The published operating point: which batches are planned, on which machine, cut how."""

from functools import cache
from pathlib import Path

from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.machine import cluster_builder, load_cluster
from megatron_dip.costs.mixtures import built_in_mixture, draw_microbatches
from megatron_dip.costs.shapes import load_model
from megatron_dip.partition import Partition, load_partition
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.planner.sub_microbatches import TokenLimit, form_sub_microbatches
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.workload import Problem

__all__ = ["NUM_MICROBATCHES", "ROOT", "batch_of", "builder_of", "partition_of", "table_of"]

ROOT = Path(__file__).parents[2]
NUM_MICROBATCHES = 64
"""Of an iteration, as published."""
_NUM_GPUS = {"vlm_s": 16, "vlm_m": 32, "vlm_l": 64, "t2v_s": 16, "t2v_l": 64}


@cache
def builder_of(model: str) -> ProblemBuilder:
    """Problems of ``model``: half of the peak at every size, only operations take time."""
    clusters = ROOT / "configs" / "clusters"
    plain = load_cluster(clusters / "h100_16_half_peak.yaml").assumptions
    cluster = load_cluster(clusters / f"h100_{_NUM_GPUS[model]}.yaml")
    return cluster_builder(
        load_model(ROOT / "configs" / "models" / f"{model}.yaml"),
        cluster.model_copy(update={"assumptions": plain}),
    )


def batch_of(model: str, seed: int, num_microbatches: int = NUM_MICROBATCHES) -> Problem:
    """A batch of the published mixture."""
    workload = built_in_mixture("vlm" if model.startswith("vlm") else "t2v")
    return builder_of(model).build(draw_microbatches(workload, num_microbatches, seed))


@cache
def partition_of(model: str) -> Partition:
    """The kept partition, which was chosen for other batches of the same kind."""
    return load_partition(ROOT / "configs" / "partitions" / f"{model}.json")


def table_of(
    problem: Problem, partition: Partition, max_tokens: dict[str, TokenLimit] | None = None
) -> TaskTable:
    """What the planner computes on, with other sizes of sub-microbatches if given."""
    sizes: dict[str, TokenLimit] = {**partition.sub_microbatch_tokens, **(max_tokens or {})}
    groups = form_sub_microbatches(problem, sizes)
    return build_task_table(PipelineGraph(problem, partition, groups))
