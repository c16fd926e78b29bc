"""What work costs: time and memory of a sub-microbatch in a stage."""

from megatron_dip.costs.work import WorkCost, static_bytes, work_cost, work_costs

__all__ = ["WorkCost", "static_bytes", "work_cost", "work_costs"]
