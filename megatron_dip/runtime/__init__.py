"""The executor and what it needs of torch: channels, stage runners, boundaries, measurement."""

from megatron_dip.runtime.agreement import PlanAgreement, connected_groups
from megatron_dip.runtime.boundary import BoundaryOf
from megatron_dip.runtime.channels import Channels, create_channel_groups
from megatron_dip.runtime.executor import Executor
from megatron_dip.runtime.plan_ahead import PlanAhead
from megatron_dip.runtime.plan_service import (
    ObtainedPlan,
    Origin,
    PlanCounts,
    PlanService,
    ServiceLimits,
)
from megatron_dip.runtime.planner_cores import RankPlace, num_planners
from megatron_dip.runtime.planner_pool import PlannerPool
from megatron_dip.runtime.planner_process import ProcessLimits
from megatron_dip.runtime.reductions import Reduction
from megatron_dip.runtime.runner import (
    ForwardCall,
    ModuleRunner,
    SavedForward,
    StageInput,
    StageRunner,
)
from megatron_dip.runtime.timeline import MeasuredSpan, Recorder, create_recorder

__all__ = [
    "BoundaryOf",
    "Channels",
    "Executor",
    "ForwardCall",
    "MeasuredSpan",
    "ModuleRunner",
    "ObtainedPlan",
    "Origin",
    "PlanAgreement",
    "PlanAhead",
    "PlanCounts",
    "PlanService",
    "PlannerPool",
    "ProcessLimits",
    "RankPlace",
    "Recorder",
    "Reduction",
    "SavedForward",
    "ServiceLimits",
    "StageInput",
    "StageRunner",
    "connected_groups",
    "create_channel_groups",
    "create_recorder",
    "num_planners",
]
