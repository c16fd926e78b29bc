"""What a memory limit costs, with recomputation and without.

Every test problem of a folder (``*-test-*.json``) is planned without a limit.  Then every rank's
limit is set to a part of what that plan takes, weights included, and the batch is planned again:
with the memory program, which recomputes layers, and without it, by holding works back alone.  The
cut is the one kept in ``configs/partitions``.  Plans above a limit end the run.

    python benchmarks/memory_limit.py FOLDER [--part 0.6] [--budget-ms 1000 | --evaluations N]
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from planner_speed import chosen_table
from rich.console import Console
from rich.table import Table

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner import search_schedule
from megatron_dip.planner.evaluator import Budget
from megatron_dip.simulator import TaskTable, simulate_order
from megatron_dip.workload import Problem, load_problem

UNLIMITED_BYTES = 10**15


class Found(NamedTuple):
    """A schedule that keeps its limits."""

    makespan_us: float
    peak_bytes: tuple[int, ...]
    recompute_part: float
    """Of the time of all ranks."""


def with_limits(problem: Problem, limits: Sequence[int]) -> Problem:
    """The same batch with these limits per rank."""
    return problem.model_copy(update={"memory_limit_bytes": tuple(limits)})


def plan(table: TaskTable, budget: Budget, workers: int, memory_program: bool) -> Found:
    """The best schedule found, checked against the limits."""
    found = search_schedule(
        table,
        evaluations=budget.evaluations,
        budget_ms=budget.milliseconds,
        workers=workers,
        memory_program=memory_program,
    )
    simulation = simulate_order(table.with_recompute(found.num_recomputed), found.order)
    limits = table.graph.problem.memory_limit_bytes
    for rank, (peak, limit) in enumerate(zip(simulation.peak_bytes, limits, strict=True)):
        if peak > limit:
            raise SystemExit(f"rank {rank} takes {peak} bytes, its limit is {limit}")
    recompute_us = float((found.num_recomputed * table.recompute_layer_us).sum())
    part = recompute_us / (simulation.makespan_us * table.num_ranks)
    return Found(simulation.makespan_us, simulation.peak_bytes, part)


def main() -> None:
    """Print one line per problem and the means per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with *-test-*.json problems")
    parser.add_argument("--part", type=float, default=0.6, help="of what the plan takes unlimited")
    parser.add_argument("--budget-ms", type=float, default=1000.0, help="per plan")
    parser.add_argument("--evaluations", type=int, help="per plan, instead of a time")
    parser.add_argument("--workers", type=int, default=1, help="searches at the same time")
    arguments = parser.parse_args()
    budget = Budget(milliseconds=arguments.budget_ms)
    if arguments.evaluations is not None:
        budget = Budget(evaluations=arguments.evaluations)
    paths = sorted(arguments.folder.glob("*-test-*.json"))
    if not paths:
        parser.error(f"{arguments.folder} holds no *-test-*.json problems")
    printed = Table(
        "problem", "limit, GB", "peak of limit", "time, recomputing", "recomputed", "holding back"
    )
    means: dict[str, list[list[float]]] = defaultdict(list)
    # Compiling, or reading what was compiled, is no part of the budget.
    first = load_problem(paths[0])
    table = chosen_table(paths[0].stem, with_limits(first, [1 << 34] * first.num_ranks))
    search_schedule(table, evaluations=90)
    for path in paths:
        problem = load_problem(path)
        unlimited_problem = with_limits(problem, [UNLIMITED_BYTES] * problem.num_ranks)
        free = chosen_table(path.stem, unlimited_problem)
        unlimited = plan(free, budget, arguments.workers, True)
        limits = [int(arguments.part * peak) for peak in unlimited.peak_bytes]
        table = chosen_table(path.stem, with_limits(problem, limits))
        row = [path.stem, f"{min(limits) / 1e9:.1f} - {max(limits) / 1e9:.1f}"]
        ratios = []
        for memory_program in (True, False):
            try:
                found = plan(table, budget, arguments.workers, memory_program)
            except InfeasibleError as error:
                row.append(str(error))
                continue
            ratios.append(found.makespan_us / unlimited.makespan_us)
            if memory_program:
                used = max(p / limit for p, limit in zip(found.peak_bytes, limits, strict=True))
                row += [f"{used:.3f}", f"{ratios[-1]:.3f}", f"{found.recompute_part:.1%}"]
            else:
                row.append(f"{ratios[-1]:.3f}")
        printed.add_row(*row)
        if len(ratios) == 2:
            means[path.stem.split("-test")[0]].append(ratios)
    for model, rows in means.items():
        recomputing, holding = (statistics.mean(column) for column in zip(*rows, strict=True))
        printed.add_row(f"{model}, mean", "", "", f"{recomputing:.3f}", "", f"{holding:.3f}")
    Console(width=120).print(printed)


if __name__ == "__main__":
    main()
