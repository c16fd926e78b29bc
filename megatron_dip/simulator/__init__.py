"""Simulation: times and memory of plans, lower bounds, timelines."""

from megatron_dip.simulator.bounds import lower_bound_us, useful_work_us
from megatron_dip.simulator.simulate import (
    Simulation,
    TimedAction,
    compute_order,
    simulate,
    simulate_order,
)
from megatron_dip.simulator.tasks import TaskTable, build_task_table

__all__ = [
    "Simulation",
    "TaskTable",
    "TimedAction",
    "build_task_table",
    "compute_order",
    "lower_bound_us",
    "simulate",
    "simulate_order",
    "useful_work_us",
]
