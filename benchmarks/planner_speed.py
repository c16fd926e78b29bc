"""How good a plan is after how long: ratio to the lower bound by budget; times of making plans.

Reads the test problems of a folder (``*-test-*.json``).  The ratios are those on the partitions in
``benchmarks/problems/partitions``.  The times are for batches of many sizes: every module but the
last is cut into 2 segments, a frozen one into 1, and the last into 4, or 7 or 6 equal ones behind a
frozen module; layers are shared out so that all ranks have about the same work, heads included;
sub-microbatches of at most 8192 tokens.

    python benchmarks/planner_speed.py PROBLEM_FOLDER [--quick]
"""

import argparse
import operator
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from megatron_dip.partition import Partition, load_partition, partition_from_layers
from megatron_dip.partitioner.cuts import balanced_counts, spread_layers
from megatron_dip.plan import PipelineGraph, Plan
from megatron_dip.plan.lowering import lower
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import Search, form_sub_microbatches, make_plan, search_schedule
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.simulator import (
    TaskTable,
    build_task_table,
    lower_bound_us,
    simulate_order,
)
from megatron_dip.workload import Problem, load_problem, parse_problem

BUDGETS_MS = (50.0, 100.0, 1000.0, 10000.0)
SIZES = ((8, 16), (8, 32), (8, 64), (8, 128), (16, 128), (16, 256))
MAX_TOKENS = 8192
PARTITIONS = Path(__file__).parent / "problems" / "partitions"


def num_segments(problem: Problem, module: str) -> int:
    """Segments of a module in the cut described above."""
    last = problem.module_order[-1]
    if module != last:
        return 2 if problem.module(module).trainable else 1
    if all(problem.module(name).trainable for name in problem.module_order):
        return 4
    num_layers = problem.module(last).num_layers
    return next((n for n in (7, 6) if num_layers % (n * problem.num_ranks) == 0), 4)


def make_partition(problem: Problem) -> Partition:
    """The partition for times of any size described above."""
    counts = balanced_counts([problem], is_joint=False)
    cuts = {
        name: spread_layers(counts[name], num_segments(problem, name))
        for name in problem.module_order
    }
    return partition_from_layers(cuts, problem.num_ranks)


def make_graph(problem: Problem, partition: Partition) -> PipelineGraph:
    """The batch in sub-microbatches of the size described above."""
    limits = dict.fromkeys(problem.module_order, MAX_TOKENS)
    return PipelineGraph(problem, partition, form_sub_microbatches(problem, limits))


def make_table(problem: Problem) -> TaskTable:
    """The batch on the partition described above."""
    return build_task_table(make_graph(problem, make_partition(problem)))


def model_of(name: str) -> str:
    """The model of a sample batch: ``vlm_s`` of ``vlm-s-test-0`` and of ``vlm-s-fit-0``."""
    return re.split("-(?:test|fit)-", name)[0].replace("-", "_")


def kept_partition(name: str, variant: str = "", folder: Path = PARTITIONS) -> Path:
    """Where the partition is kept for the model that ``name`` starts with, as ``vlm-s-test-0``."""
    return folder / f"{model_of(name)}{variant}.json"


def chosen_table(
    name: str, problem: Problem, variant: str = "", folder: Path = PARTITIONS
) -> TaskTable:
    """The batch on the partition kept for its model; where none is, on the one described above."""
    path = kept_partition(name, variant, folder)
    if not path.exists():
        return make_table(problem)
    partition = load_partition(path)
    groups = form_sub_microbatches(problem, partition.sub_microbatch_tokens)
    return build_task_table(PipelineGraph(problem, partition, groups))


def resized(problem: Problem, num_ranks: int, num_microbatches: int) -> Problem:
    """The same kind of batch with other numbers of ranks and microbatches."""
    limit = max(problem.memory_limit_bytes)
    repeats = -(-num_microbatches // problem.num_microbatches)
    data = problem.model_dump()
    return parse_problem(
        data
        | {
            "num_ranks": num_ranks,
            "memory_limit_bytes": (limit,) * num_ranks,
            "microbatches": (data["microbatches"] * repeats)[:num_microbatches],
        }
    )


def quality_table(problems: dict[str, Problem], budgets_ms: tuple[float, ...]) -> Table:
    """Mean ratio of the lower bound to the makespan, per model, search and budget."""
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for name, problem in problems.items():
        table = chosen_table(name, problem)
        bound_us = lower_bound_us(table)
        for search in get_args(Search):
            ratios = [
                bound_us / search_schedule(table, search=search, budget_ms=budget).makespan_us
                for budget in budgets_ms
            ]
            found[name.split("-test")[0], search].append(ratios)
    printed = Table("model", "search", *(f"{budget:.0f} ms" for budget in budgets_ms))
    for (model, search), rows in sorted(found.items()):
        means = (f"{statistics.mean(column):.3f}" for column in zip(*rows, strict=True))
        printed.add_row(model, search, *means)
    return printed


def speed_table(problem: Problem) -> Table:
    """Processor time of one evaluation, and of simulating its order, by number of actions."""
    printed = Table("ranks", "microbatches", "actions", "evaluation", "per action", "simulator")
    for num_ranks, num_microbatches in SIZES:
        table = make_table(resized(problem, num_ranks, num_microbatches))
        evaluator = Evaluator(table, Budget(evaluations=99), split_backward=False, goal_us=0.0)
        portfolio = Portfolio(table, evaluator.forwards)
        evaluation_s, simulation_s = [], []
        for rule, order in list(portfolio.starts())[:8]:
            started = time.thread_time()
            schedule = evaluator.evaluate(portfolio.point(rule, order))
            evaluation_s.append(time.thread_time() - started)
            simulate_order(table, schedule.order)
            started = time.thread_time()
            simulate_order(table, schedule.order)
            simulation_s.append(time.thread_time() - started)
        num_actions = int(table.whole.exists.sum())
        median_s = statistics.median(evaluation_s)
        printed.add_row(
            str(num_ranks),
            str(num_microbatches),
            str(num_actions),
            f"{median_s * 1e3:.2f} ms",
            f"{median_s / num_actions * 1e9:.0f} ns",
            f"{num_actions / statistics.median(simulation_s) / 1e6:.0f} M actions/s",
        )
    return printed


def first_plan_s(problem: Problem, partition: Partition) -> dict[str, float]:
    """Processor time of a first plan, of one evaluation, and of the parts that make it."""
    marks = [time.thread_time()]

    def passed[Result](result: Result) -> Result:
        marks.append(time.thread_time())
        return result

    graph = make_graph(problem, partition)
    passed(graph.wiring)
    table = build_task_table(graph)
    passed((table.whole, table.split))
    found = passed(search_schedule(table, evaluations=1))
    simulation = passed(simulate_order(table, found.order))
    actions = passed(lower(graph, simulation.completion_order))
    passed(validate_plan(Plan.of_graph(graph, actions)))
    limits = dict.fromkeys(problem.module_order, MAX_TOKENS)
    passed(make_plan(problem, partition, max_tokens=limits, evaluations=1))
    names = ("graph", "table", "search", "simulation", "lowering", "validation", "whole plan")
    return dict(zip(names, map(operator.sub, marks[1:], marks), strict=True))


def plan_table(problem: Problem) -> Table:
    """Medians of :func:`first_plan_s` by size; the whole plan has a 1F1B schedule beside it."""
    printed = Table("ranks", "microbatches")
    for num_ranks, num_microbatches in SIZES:
        batch = resized(problem, num_ranks, num_microbatches)
        partition = make_partition(batch)
        runs = [first_plan_s(batch, partition) for _ in range(5)]
        if not printed.rows:
            for name in runs[0]:
                printed.add_column(name)
        medians = (statistics.median(run[name] for run in runs) for name in runs[0])
        sizes = (str(num_ranks), str(num_microbatches))
        printed.add_row(*sizes, *(f"{median * 1e3:.1f} ms" for median in medians))
    return printed


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with *-test-*.json problems")
    parser.add_argument("--quick", action="store_true", help="budgets up to 100 ms")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.glob("*-test-*.json"))
    if not paths:
        parser.error(f"{arguments.folder} holds no *-test-*.json problems")
    problems = {path.stem: load_problem(path) for path in paths}
    largest = max(problems.values(), key=lambda problem: problem.num_ranks * len(str(problem)))
    # Compiling, or reading what was compiled, is no part of the times.
    first = make_table(next(iter(problems.values())))
    search_schedule(first, evaluations=80)
    first_plan_s(largest, make_partition(largest))
    console = Console()
    console.print(speed_table(largest))
    console.print(plan_table(largest))
    console.print(quality_table(problems, BUDGETS_MS[:2] if arguments.quick else BUDGETS_MS))


if __name__ == "__main__":
    main()
