"""What work costs: time and memory of a sub-microbatch in a stage, and problems from sizes."""

from megatron_dip.costs.analytic import ProblemBuilder
from megatron_dip.costs.work import WorkCost, static_bytes, work_cost

__all__ = ["ProblemBuilder", "WorkCost", "static_bytes", "work_cost"]
