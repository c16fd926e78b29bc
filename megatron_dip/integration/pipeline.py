"""What a rank needs to run plans under Megatron: configuration, groups, channels, boundaries."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.config import DipConfig, build_partition
from megatron_dip.costs import ItemSizes, config_builder
from megatron_dip.partition import Partition
from megatron_dip.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.runtime import (
    BoundaryRules,
    Channels,
    agree_on_plan,
    create_channel_groups,
    pipeline_channels,
)
from megatron_dip.workload import Problem

__all__ = ["DipPipeline"]


class DipPipeline:
    """One pipeline's share of the run, the same object for all chunks of a rank.

    Making it is a collective call of the whole world: it creates process groups.

    Args:
        config: The run's configuration.
        transformer_config: Megatron's configuration of the module with the loss.
        boundaries: Shapes of what is received.
        timeout_seconds: Limit of every wait of the executor.
    """

    def __init__(
        self,
        config: DipConfig,
        transformer_config: TransformerConfig,
        boundaries: BoundaryRules,
        timeout_seconds: float,
        device: torch.device,
    ) -> None:
        self.config = config
        self.partition: Partition = build_partition(config)
        self.rank: int = mpu.get_pipeline_model_parallel_rank()
        self._problems = config_builder(
            config,
            is_fp32=transformer_config.params_dtype == torch.float32,
            num_tensor_ranks=mpu.get_tensor_model_parallel_world_size(),
            sequence_parallel=transformer_config.sequence_parallel,
        )
        self.boundaries = boundaries
        own_pipeline = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
        upstream = {module.name: module.upstream for module in config.model_shape().modules}
        channels = pipeline_channels(self.partition, upstream)
        pipelines = _gather_distinct(own_pipeline)
        groups = create_channel_groups(channels, pipelines, timeout_seconds)
        self._plan_group = _create_plan_group(timeout_seconds)
        self.channels = Channels(
            rank=self.rank,
            pipeline=own_pipeline,
            groups=groups,
            device=device,
            timeout_seconds=timeout_seconds,
        )

    @property
    def is_plan_owner(self) -> bool:
        return bool(dist.get_rank(self._plan_group) == 0)

    def agree_on_plan(self, microbatches: Sequence[ItemSizes]) -> Plan:
        """The plan of a batch, the same on all ranks of this pipeline; see ``runtime``."""
        problem = self._problems.build(microbatches)
        return agree_on_plan(problem, self.partition, self._make_plan, self._plan_group)

    def _make_plan(self, problem: Problem, partition: Partition) -> Plan:
        schedule = self.config.schedule
        is_searched = schedule.planner == "dual_queue"
        return make_plan(
            problem,
            partition,
            algorithm=schedule.planner,
            evaluations=(schedule.evaluations or None) if is_searched else None,
            # The batch is there and must be trained: one rank may run out of memory, none waits.
            when_infeasible="least_memory",
        )


def _gather_distinct(ranks: Sequence[int]) -> list[list[int]]:
    """The rank lists of all processes of the world, each once, in one order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(ranks))
    return [list(ranks) for ranks in sorted({tuple(ranks) for ranks in gathered})]


def _create_plan_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A CPU group of all ranks that run one plan: the tensor and pipeline peers of a replica."""
    own = dist.get_process_group_ranks(mpu.get_model_parallel_group())
    result: dist.ProcessGroup | None = None
    for members in _gather_distinct(own):
        group = dist.new_group(
            members,
            timeout=timedelta(seconds=timeout_seconds),
            backend="gloo",
            group_desc="dip: plans",
        )
        if dist.get_rank() in members:
            assert isinstance(group, dist.ProcessGroup)
            result = group
    assert result is not None
    return result
