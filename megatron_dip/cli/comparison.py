"""The table that compares plans and baselines."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from rich.console import Console
from rich.table import Table

from megatron_dip.plan.plan import Plan
from megatron_dip.planner.baselines import BaselineResult
from megatron_dip.simulator.bounds import lower_bound_us, useful_work_us
from megatron_dip.simulator.simulate import Simulation
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import Problem

__all__ = ["Row", "print_rows"]


class Row(NamedTuple):
    """One schedule of a batch."""

    name: str
    problem: Problem
    makespan_us: float
    bound_us: float | None
    """Of all schedules on its stages; None where it has none of its own."""
    idle: Sequence[float]
    """Per rank, the part of the makespan without computing."""
    peak_bytes: Sequence[int]
    host_peak_bytes: Sequence[int] = ()
    """Per rank, of the memory of its host; empty where nothing is offloaded."""

    @classmethod
    def of_plan(cls, name: str, plan: Plan, simulation: Simulation) -> Self:
        bound_us = lower_bound_us(
            build_task_table(plan.graph), split_backward=simulation.has_split_backward
        )
        return cls(
            name,
            plan.problem,
            simulation.makespan_us,
            bound_us,
            simulation.bubble_fraction,
            simulation.peak_bytes,
            simulation.host_peak_bytes if plan.offload else (),
        )

    @classmethod
    def of_baseline(cls, name: str, result: BaselineResult) -> Self:
        title = f"{name} ({result.detail})" if result.detail else name
        bound_us = None
        if result.plan is not None and result.plan.estimate is not None:
            bound_us = result.plan.estimate.lower_bound_us
        return cls(
            title,
            result.problem,
            result.makespan_us,
            bound_us,
            result.idle,
            result.peak_bytes,
        )

    @property
    def keeps_memory_limit(self) -> bool:
        link = self.problem.host_link
        limits = link.memory_bytes if link is not None and self.host_peak_bytes else ()
        return self.problem.keeps_memory_limit(self.peak_bytes) and all(
            peak <= limit for peak, limit in zip(self.host_peak_bytes, limits, strict=True)
        )


def print_rows(rows: Sequence[Row]) -> None:
    """Print ``rows``: time, ratio to the lower bound, utilisation, idle time and memory."""
    table = Table("plan", "time", "of bound", "utilisation", "idle per rank", "peak memory")
    for row in rows:
        useful_us = useful_work_us(row.problem) / row.problem.num_ranks
        memory = f"{max(row.peak_bytes) / 1e9:.2f} GB"
        if row.host_peak_bytes:
            memory += f", of the host {max(row.host_peak_bytes) / 1e9:.2f} GB"
        table.add_row(
            row.name,
            f"{row.makespan_us / 1000:.1f} ms",
            f"{row.makespan_us / row.bound_us:.3f}" if row.bound_us else "-",
            f"{useful_us / row.makespan_us:.1%}" if row.makespan_us else "-",
            " ".join(f"{idle:.1%}" for idle in row.idle),
            memory if row.keeps_memory_limit else f"{memory}, over the limit",
        )
    Console().print(table)
