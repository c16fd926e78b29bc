"""What a rank needs to run plans under Megatron: configuration, groups, channels, boundaries."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.config import DipConfig, build_partition
from megatron_dip.costs import ModelShape, ProblemBuilder, config_builder
from megatron_dip.integration import cpu_mode
from megatron_dip.integration.expert_rules import check_expert_plans
from megatron_dip.integration.feedback import MeasuredStep, StepFeedback, log_step
from megatron_dip.integration.kernels import kernels_of
from megatron_dip.integration.trace import agree_on_run, write_record
from megatron_dip.partition import Partition
from megatron_dip.planner import PlannerSettings, load_joint_plan
from megatron_dip.report.steps import StepRecord
from megatron_dip.runtime import (
    BoundaryOf,
    Channels,
    Executor,
    PlanAgreement,
    PlanAhead,
    PlannerPool,
    PlanService,
    ProcessLimits,
    ServiceLimits,
    connected_groups,
    create_channel_groups,
    pipeline_channels,
)

__all__ = ["DipPipeline", "partition_of", "run_builder"]

# Above what training has (0), so that a planner gets what training leaves of a shared core.
_PLANNER_NICE = 10


class DipPipeline:
    """One pipeline's share of the run, the same object for all chunks of a rank.

    Making it is a collective call of the whole world: it creates process groups.

    Args:
        config: The run's configuration.
        model: The modules, upstream ones first.
        transformer_config: Megatron's configuration of the run.
        boundary: The boundaries of all modules: shapes of what is received.
        timeout_seconds: Limit of every wait of the executor.
        device: Where the stages compute.
        planner_cores: Where planner processes run; where this process may run if empty.
    """

    def __init__(
        self,
        config: DipConfig,
        model: ModelShape,
        transformer_config: TransformerConfig,
        boundary: BoundaryOf,
        timeout_seconds: float,
        device: torch.device,
        planner_cores: Sequence[int] = (),
    ) -> None:
        agree_on_run()
        self.config, self.model = config, model
        self.partition: Partition = partition_of(config, model)
        check_expert_plans(get_args(), model, self.partition)
        path = config.schedule.plan
        # On all ranks, so that all of them refuse a plan that does not fit.
        self._fixed_plan = load_joint_plan(path, self.partition) if path is not None else None
        self.rank: int = mpu.get_pipeline_model_parallel_rank()
        self._problems = run_builder(config, model, transformer_config)
        own_pipeline = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
        upstream = {module.name: module.upstream for module in model.modules}
        channels = pipeline_channels(self.partition, upstream)
        pipelines = _gather_distinct(own_pipeline)
        groups = create_channel_groups(channels, pipelines, timeout_seconds)
        replica = dist.get_process_group_ranks(mpu.get_model_parallel_group())
        self.writes_records = dist.get_rank() == replica[0]
        """Whether this rank writes what concerns its whole replica."""
        agreement = _create_agreement(self.partition, replica, timeout_seconds)
        self.is_plan_owner = agreement.is_owner
        service = self._create_service(planner_cores) if self.is_plan_owner else None
        self.plans = PlanAhead(lambda: self._problems, agreement, service)
        """The plans of batches to come; the same calls on all ranks."""
        self.feedback = StepFeedback(
            self.partition,
            self._problems.layer_overheads(),
            _create_group(_gather_distinct(replica), timeout_seconds, "times"),
            self.rank,
        )
        self.device = device
        self.executor = Executor(
            rank=self.rank,
            channels=Channels(
                rank=self.rank,
                pipeline=own_pipeline,
                groups=groups,
                device=device,
                timeout_seconds=timeout_seconds,
            ),
            boundary=boundary,
            dtype=transformer_config.pipeline_dtype or transformer_config.params_dtype,
        )
        self.executor.channels.connect()

    def follow(self, step: MeasuredStep) -> None:
        """Use and record what the step before this one has measured; the last one's own, too."""
        record, corrections = self.feedback.end_step(step)
        if corrections is not None and self.config.schedule.costs.feedback:
            self._problems = replace(
                self._problems,
                stage_factors=corrections.factors,
                layer_overheads_us=corrections.overheads_us,
            )
            if self.plans.service is not None:
                self.plans.service.set_builder(self._problems)
        self._record(record)
        if step.iteration == get_args().train_iters:
            self._record(self.feedback.last_step())

    def _record(self, record: StepRecord | None) -> None:
        if record is None:
            return
        if mpu.get_data_parallel_rank() == mpu.get_data_parallel_world_size() - 1:
            log_step(record)
        if self.writes_records:
            write_record(record)

    def _create_service(self, planner_cores: Sequence[int]) -> PlanService:
        schedule, planning = self.config.schedule, self.config.planning
        limits = ProcessLimits(
            memory_bytes=int(planning.worker_memory_gib * 2**30),
            nice=_PLANNER_NICE,
            cores=tuple(planner_cores),
        )
        return PlanService(
            builder=self._problems,
            partition=self.partition,
            settings=PlannerSettings(
                algorithm=schedule.planner,
                evaluations=schedule.evaluations,
                fixed=self._fixed_plan,
            ),
            pool=PlannerPool(planning.workers, limits),
            limits=ServiceLimits(
                wait_ms=planning.wait_limit_ms,
                search_ms=planning.search_limit_ms,
                steps_ahead=max(1, planning.look_ahead - 1),
            ),
        )


def partition_of(config: DipConfig, model: ModelShape) -> Partition:
    """How ``model`` is cut among the pipeline ranks of this launch."""
    num_layers = {module.name: module.num_layers for module in model.modules}
    num_ranks = mpu.get_pipeline_model_parallel_world_size()
    return build_partition(config.schedule, num_layers, num_ranks)


def run_builder(
    config: DipConfig, model: ModelShape, transformer_config: TransformerConfig
) -> ProblemBuilder:
    """What makes the problems of this run: its model at its precision and parallel sizes."""
    return config_builder(
        config.schedule,
        model,
        partition_of(config, model),
        num_ranks=mpu.get_pipeline_model_parallel_world_size(),
        kernels=kernels_of(transformer_config, on_cpu=cpu_mode.is_enabled()),
        num_tensor_ranks=mpu.get_tensor_model_parallel_world_size(),
        num_expert_ranks=mpu.get_expert_model_parallel_world_size(),
        sequence_parallel=transformer_config.sequence_parallel,
        optimizer_shards=mpu.get_data_parallel_world_size()
        if get_args().use_distributed_optimizer
        else 1,
    )


def _gather_distinct(ranks: Sequence[int]) -> list[list[int]]:
    """The rank lists of all processes of the world, each once, in one order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(ranks))
    return [list(ranks) for ranks in sorted({tuple(ranks) for ranks in gathered})]


def _create_agreement(
    partition: Partition, replica: Sequence[int], timeout_seconds: float
) -> PlanAgreement:
    """Of all ranks that run one plan: those of a replica, and of all that it shares experts with.

    Args:
        replica: The tensor and pipeline peers of this rank.
    """
    replicas = _gather_distinct(replica)
    experts = dist.get_process_group_ranks(mpu.get_expert_tensor_and_model_parallel_group())
    groups = connected_groups([*replicas, *_gather_distinct(experts)])
    own = next(group for group in groups if dist.get_rank() in group)
    sharing = [members for members in replicas if members[0] in own]
    return PlanAgreement(
        partition,
        _create_group(groups, timeout_seconds, "plans"),
        leaders=[own.index(members[0]) for members in sharing],
        replica=sharing.index(list(replica)),
    )


def _create_group(
    groups: Sequence[Sequence[int]], timeout_seconds: float, use: str
) -> dist.ProcessGroup:
    """The CPU group of this rank among ``groups``, which all ranks of the world make."""
    result: dist.ProcessGroup | None = None
    for members in groups:
        group = dist.new_group(
            list(members),
            timeout=timedelta(seconds=timeout_seconds),
            backend="gloo",
            group_desc=f"dip: {use}",
        )
        if dist.get_rank() in members:
            assert isinstance(group, dist.ProcessGroup)
            result = group
    assert result is not None
    return result
