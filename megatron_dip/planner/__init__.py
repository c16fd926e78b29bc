"""Planning: from a batch problem and a partition to a plan."""

from megatron_dip.planner.batch import Batch
from megatron_dip.planner.dual_queue import Priority, default_priority, order_dual_queue
from megatron_dip.planner.joint import joint_problem, load_joint_plan, restrict_plan
from megatron_dip.planner.one_f_one_b import order_one_f_one_b
from megatron_dip.planner.planned import PlannedBatch
from megatron_dip.planner.planner import Algorithm, WhenInfeasible, make_plan, plan_from_order
from megatron_dip.planner.rounds import PlannerSettings, RoundPlan, plan_in_rounds
from megatron_dip.planner.search import Search, schedule_by_default, search_schedule
from megatron_dip.planner.sub_microbatches import form_sub_microbatches
from megatron_dip.planner.wire import Build, pack_plan, plan_digest, sizes_digest, unpack_plan

__all__ = [
    "Algorithm",
    "Batch",
    "Build",
    "PlannedBatch",
    "PlannerSettings",
    "Priority",
    "RoundPlan",
    "Search",
    "WhenInfeasible",
    "default_priority",
    "form_sub_microbatches",
    "joint_problem",
    "load_joint_plan",
    "make_plan",
    "order_dual_queue",
    "order_one_f_one_b",
    "pack_plan",
    "plan_digest",
    "plan_from_order",
    "plan_in_rounds",
    "restrict_plan",
    "schedule_by_default",
    "search_schedule",
    "sizes_digest",
    "unpack_plan",
]
