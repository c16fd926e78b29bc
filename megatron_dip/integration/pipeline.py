"""What a rank needs to run plans under Megatron: the cut, groups, channels, planning, executor."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import mpu

from megatron_dip.costs import ProblemBuilder
from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.compiled_functions import allow_versions
from megatron_dip.integration.device_feed import DeviceFeed
from megatron_dip.integration.feedback import MeasuredStep, StepFeedback, log_step
from megatron_dip.integration.groups import (
    create_agreement,
    create_group,
    gather_distinct,
    gather_places,
    replica_ranks,
)
from megatron_dip.integration.hardware_queues import choose_queues
from megatron_dip.integration.options import DipOptions
from megatron_dip.integration.trace import (
    agree_on_run,
    last_iteration,
    write_machine,
    write_record,
)
from megatron_dip.models.staged import StagedModel
from megatron_dip.partition import Partition
from megatron_dip.plan import pipeline_channels
from megatron_dip.planner import PlannerSettings, load_joint_plan
from megatron_dip.report.steps import StepRecord
from megatron_dip.runtime import (
    Channels,
    Executor,
    PlanAhead,
    PlannerPool,
    PlanService,
    ProcessLimits,
    RankPlace,
    ServiceLimits,
    create_channel_groups,
    num_planners,
)

__all__ = ["DipPipeline"]

# Above what training has (0), so that a planner gets what training leaves of a shared core.
_PLANNER_NICE = 10


class DipPipeline:
    """One pipeline's share of the run, the same object for all chunks of a rank.

    Making it is a collective call of the whole world: it creates process groups.

    Args:
        options: What the run asks for.
        staged: How its model is cut.
        partition: The cut.
        problems: Makes problems of batches.
        dtype: Of what stages exchange.
    """

    def __init__(
        self,
        *,
        options: DipOptions,
        staged: StagedModel,
        partition: Partition,
        problems: ProblemBuilder,
        dtype: torch.dtype,
    ) -> None:
        agree_on_run()
        allow_versions()
        timeout_seconds = options.timeout_seconds
        self.config = options.config
        self.checks_parts = options.check_parts
        """Whether split microbatches are still to be compared with whole ones."""
        self.staged = staged
        self.partition = partition
        path = self.config.schedule.plan
        # On all ranks, so that all of them refuse a plan that does not fit.
        self._fixed_plan = load_joint_plan(path, self.partition) if path is not None else None
        self.rank: int = mpu.get_pipeline_model_parallel_rank()
        self._problems = problems
        self.stated_problems = problems
        """Nothing measured in it."""
        self.recuts = self.config.schedule.assignment != "none" and not staged.assigns_samples
        """Whether samples of a script's own microbatches are exchanged."""
        own_pipeline = dist.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())
        upstream = {module.name: module.upstream for module in problems.model.modules}
        self.queues = choose_queues(
            self.config.schedule.hardware_queues, self.partition, upstream, self._fixed_plan
        )
        """What plans are made for."""
        channels = pipeline_channels(self.partition, upstream)
        pipelines = gather_distinct(own_pipeline)
        groups = create_channel_groups(
            channels,
            pipelines,
            timeout_seconds,
            num_communicators=1 if self.queues is None else self.queues.communicators,
        )
        replica = replica_ranks()
        self.writes_records = dist.get_rank() == replica[0]
        """Whether this rank writes what concerns its whole replica."""
        agreement = create_agreement(self.partition, replica, timeout_seconds)
        self.is_plan_owner = agreement.is_owner
        places = gather_places(options.planner_cores, is_owner=self.is_plan_owner)
        service = self._create_service(options, places) if self.is_plan_owner else None
        self.plans = PlanAhead(lambda: self._problems, agreement, service)
        """The plans of batches to come; the same calls on all ranks."""
        self.feedback = StepFeedback(
            self.partition,
            self._problems.layer_overheads(),
            create_group(gather_distinct(replica), timeout_seconds, "times"),
            self.rank,
        )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.feed = DeviceFeed(self.device)
        """Copies data of coming forwards; one for all steps, so that its stream is one."""
        self.executor = Executor(
            rank=self.rank,
            channels=Channels(
                rank=self.rank,
                pipeline=own_pipeline,
                groups=groups,
                device=self.device,
                timeout_seconds=timeout_seconds,
            ),
            boundary=staged.boundary,
            dtype=dtype,
        )
        self.executor.channels.connect()
        if self.writes_records:
            write_machine(self._problems, self.device)

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
        if step.iteration == last_iteration():
            self._record(self.feedback.last_step())

    def _record(self, record: StepRecord | None) -> None:
        if record is None:
            return
        if mpu.get_data_parallel_rank() == mpu.get_data_parallel_world_size() - 1:
            log_step(record)
        if self.writes_records:
            write_record(record)

    def _create_service(self, options: DipOptions, places: Sequence[RankPlace]) -> PlanService:
        schedule, planning = self.config.schedule, self.config.planning
        limits = ProcessLimits(
            memory_bytes=int(planning.worker_memory_gib * 2**30),
            nice=_PLANNER_NICE,
            cores=options.planner_cores,
        )
        return PlanService(
            builder=self._problems,
            partition=self.partition,
            settings=PlannerSettings(
                algorithm=schedule.planner,
                evaluations=schedule.evaluations,
                split_backward=schedule.split_backward,
                fixed=self._fixed_plan,
                queues=self.queues,
                searches=planning.searches,
                varied=self._varied_modules() if options.vary_parts else (),
            ),
            pool=PlannerPool(num_planners(planning.workers, places, dist.get_rank()), limits),
            limits=ServiceLimits(
                wait_ms=planning.wait_limit_ms,
                search_ms=planning.search_limit_ms,
                steps_ahead=max(1, planning.look_ahead - 1),
            ),
        )

    def _varied_modules(self) -> tuple[str, ...]:
        """Those of which every microbatch can be split."""
        found = []
        for module in self._problems.model.modules:
            try:
                self.staged.check_split(module.name)
            except UnsupportedError:
                continue
            # Experts may have an auxiliary loss, which is no sum over parts.
            if not module.has_experts:
                found.append(module.name)
        return tuple(found)
