"""What a memory limit costs: with recomputation, without it, and on a cut made for the limit.

Every test problem of a folder (``*-test-*.json``) is planned without a limit.  Then every rank's
limit is set to a part of what that plan takes, weights included, and the batch is planned again:

- with the memory program, which recomputes layers, on the same cut, that of the folder
  ``--partitions``;
- the same with a link to the host, over which layers are offloaded;
- the same without either, by holding works back alone;
- with it on a cut that was chosen for fit problems limited in the same way: who has less memory
  chooses another cut.  These are ``*_low_memory.json`` there, and ``--write-fit``
  writes the problems from which ``megatron-dip partition`` chose them.

Plans above a limit end the run.

    python benchmarks/memory_limit.py FOLDER [--part 0.6] [--link-gb-per-s 50] [--host-gb 256]
        [--budget-ms 1000 | --evaluations N] [--partitions benchmarks/problems/partitions]
    python benchmarks/memory_limit.py FOLDER --write-fit OTHER_FOLDER [--evaluations N]
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from planner_speed import PARTITIONS, chosen_table, kept_partition, model_of
from rich.console import Console
from rich.table import Table

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner import search_schedule
from megatron_dip.planner.evaluator import Budget
from megatron_dip.planner.planner import simulate_schedule
from megatron_dip.simulator import TaskTable
from megatron_dip.workload import HostLink, Problem, load_problem

UNLIMITED_BYTES = 10**15
LOW_MEMORY = "_low_memory"


class Search(NamedTuple):
    """How batches are planned."""

    budget: Budget
    workers: int
    partitions: Path
    """The folder of cuts."""


class Found(NamedTuple):
    """A schedule that keeps its limits."""

    makespan_us: float
    peak_bytes: tuple[int, ...]
    recompute_part: float
    """Of the time of all ranks."""
    host_peak_bytes: int
    """Of the rank that takes most of its host."""


class Case(NamedTuple):
    """A batch, and what it takes without a limit."""

    name: str
    limited: Problem
    unlimited: Found


def with_limits(problem: Problem, limits: Sequence[int]) -> Problem:
    """The same batch with these limits per rank."""
    return problem.model_copy(update={"memory_limit_bytes": tuple(limits)})


def with_link(problem: Problem, gb_per_s: float, host_gb: float) -> Problem:
    """The same batch with a link to the host of every rank."""
    link = HostLink(
        latency_us=20.0,
        bytes_per_us=gb_per_s * 1000,
        memory_bytes=(int(host_gb * 1e9),) * problem.num_ranks,
    )
    return problem.model_copy(update={"host_link": link})


def plan(table: TaskTable, search: Search, memory_program: bool = True) -> Found:
    """The best schedule found, checked against the limits."""
    found = search_schedule(
        table,
        evaluations=search.budget.evaluations,
        budget_ms=search.budget.milliseconds,
        workers=search.workers,
        memory_program=memory_program,
    )
    simulation = simulate_schedule(table, found)
    limits = table.graph.problem.memory_limit_bytes
    for rank, (peak, limit) in enumerate(zip(simulation.peak_bytes, limits, strict=True)):
        if peak > limit:
            raise SystemExit(f"rank {rank} takes {peak} bytes, its limit is {limit}")
    link = table.graph.problem.host_link
    host_peak_bytes = max(simulation.host_peak_bytes)
    if host_peak_bytes > min(link.memory_bytes if link else (0,)):
        raise SystemExit(f"a rank takes {host_peak_bytes} bytes of its host, more than it has")
    recompute_us = float((found.num_recomputed * table.recompute_layer_us).sum())
    part = recompute_us / (simulation.makespan_us * table.num_ranks)
    return Found(simulation.makespan_us, simulation.peak_bytes, part, host_peak_bytes)


def limited_cases(paths: Sequence[Path], part: float, search: Search) -> Iterator[Case]:
    """Every batch with ``part`` of the memory that its plan without a limit takes."""
    for path in paths:
        problem = load_problem(path)
        free = with_limits(problem, [UNLIMITED_BYTES] * problem.num_ranks)
        unlimited = plan(chosen_table(path.stem, free, folder=search.partitions), search)
        limits = [int(part * peak) for peak in unlimited.peak_bytes]
        yield Case(path.stem, with_limits(problem, limits), unlimited)


def row_of(case: Case, linked: Problem, search: Search) -> tuple[list[str], list[float | None]]:
    """The cells of a batch, and its four times over that without a limit, where it has them;
    ``linked`` is the limited batch with a link."""
    limits = case.limited.memory_limit_bytes
    row = [case.name, f"{min(limits) / 1e9:.1f} - {max(limits) / 1e9:.1f}"]
    ratios: list[float | None] = []
    for problem, variant, memory_program in (
        (case.limited, "", True),
        (linked, "", True),
        (case.limited, LOW_MEMORY, True),
        (case.limited, "", False),
    ):
        cells, ratio = ["none kept", ""], None
        if not variant or kept_partition(case.name, variant, search.partitions).exists():
            table = chosen_table(case.name, problem, variant, search.partitions)
            try:
                found = plan(table, search, memory_program)
            except InfeasibleError:
                cells = ["does not fit", ""]
            else:
                ratio = found.makespan_us / case.unlimited.makespan_us
                cells = [f"{ratio:.3f}", f"{found.recompute_part:.1%}"]
                if problem is linked:
                    cells.append(f"{found.host_peak_bytes / 1e9:.0f}")
        if problem is linked:
            cells = [*cells, ""][:3]
        row += cells if memory_program else cells[:1]
        ratios.append(ratio)
    return row, ratios


def mean_of(ratios: Sequence[float | None]) -> str:
    """Nothing where a batch has none: a mean over the others would flatter."""
    there = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.mean(there):.3f}" if len(there) == len(ratios) else ""


def print_table(cases: Iterator[Case], link: tuple[float, float], search: Search) -> None:
    """One line per batch, and the means per model; ``link`` is as in :func:`with_link`."""
    printed = Table(
        "problem",
        "limit, GB",
        "time",
        "recomputed",
        "offloading",
        "recomputed",
        "host, GB",
        "cut for the limit",
        "recomputed",
        "holding back",
    )
    ratios: dict[str, list[list[float | None]]] = defaultdict(list)
    for case in cases:
        row, found = row_of(case, with_link(case.limited, *link), search)
        printed.add_row(*row)
        ratios[model_of(case.name)].append(found)
    for model, rows in ratios.items():
        same, lent, other, holding = map(mean_of, zip(*rows, strict=True))
        printed.add_row(f"{model}, mean", "", same, "", lent, "", "", other, "", holding)
    Console(width=140).print(printed)


def main() -> None:
    """Print the table, or write limited fit problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with *-test-*.json problems")
    parser.add_argument("--part", type=float, default=0.6, help="of what the plan takes unlimited")
    parser.add_argument("--link-gb-per-s", type=float, default=50.0, help="of a rank to its host")
    parser.add_argument("--host-gb", type=float, default=256.0, help="of the host, per rank")
    parser.add_argument("--budget-ms", type=float, default=1000.0, help="per plan")
    parser.add_argument("--evaluations", type=int, help="per plan, instead of a time")
    parser.add_argument("--workers", type=int, default=1, help="searches at the same time")
    parser.add_argument("--partitions", type=Path, default=PARTITIONS, help="folder of cuts")
    parser.add_argument("--write-fit", type=Path, help="where *-fit-*.json go, limited")
    arguments = parser.parse_args()
    budget = Budget(milliseconds=arguments.budget_ms)
    if arguments.evaluations is not None:
        budget = Budget(evaluations=arguments.evaluations)
    search = Search(budget, arguments.workers, arguments.partitions)
    pattern = "*-fit-*.json" if arguments.write_fit else "*-test-*.json"
    paths = sorted(arguments.folder.glob(pattern))
    if not paths:
        parser.error(f"{arguments.folder} holds no {pattern} problems")
    # Compiling, or reading what was compiled, is no part of the budget.
    first = load_problem(paths[0])
    roomy = with_limits(first, [1 << 34] * first.num_ranks)
    table = chosen_table(paths[0].stem, roomy, folder=search.partitions)
    search_schedule(table, evaluations=90)
    cases = limited_cases(paths, arguments.part, search)
    if not arguments.write_fit:
        link = (arguments.link_gb_per_s, arguments.host_gb)
        print_table(cases, link, search)
        return
    arguments.write_fit.mkdir(parents=True, exist_ok=True)
    for case in cases:
        (arguments.write_fit / f"{case.name}.json").write_text(case.limited.model_dump_json())


if __name__ == "__main__":
    main()
