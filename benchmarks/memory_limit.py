"""What a memory limit costs: with recomputation, with offloading, and on a cut made for the limit.

The batches are those that DIP published the data of (``five_models.py``), or the test problems of a
folder (``*-test-*.json``).  Each is planned without a limit.  Then every rank's limit is set to a
part of what that plan takes, weights included, but at most of the limit that the batch states, and
it is planned again, on the same cut:

- with recomputation alone;
- the same with links to the host, over which layers are offloaded, and hosts with more or less
  memory;
- without either, by holding works back alone;
- where ``--partitions`` has a ``*_low_memory.json``: with recomputation on that cut, which was
  chosen for fit problems limited in the same way.  ``--write-fit`` writes these.

A budget is processor time of planning.  Plans above a limit end the run.

    python benchmarks/memory_limit.py [FOLDER | --models MODEL ...] [--part 0.6]
        [--link-gb-per-s 50 12.5] [--host-gb 256 32] [--partitions FOLDER]
        [--budget-ms 1000 | --evaluations N]
    python benchmarks/memory_limit.py [FOLDER] --write-fit OTHER_FOLDER [--evaluations N]
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import five_models
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


class Variant(NamedTuple):
    """A way to keep the limits."""

    title: str
    link: tuple[float, float] | None = None
    """As in :func:`with_link`."""
    suffix: str = ""
    """Of the cut's file."""
    memory_program: bool = True


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
    with five_models.processor_clock():
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


def load_batches(
    folder: Path | None, models: Sequence[str], kind: str
) -> list[tuple[str, Problem]]:
    """By name: the ``fit`` or ``test`` problems of ``folder``, DIP's of ``models`` without one."""
    if folder is not None:
        paths = sorted(folder.glob(f"*-{kind}-*.json"))
        return [(path.stem, load_problem(path)) for path in paths]
    return [
        (f"{model}-{kind}-{number}", problem)
        for model in models
        for number, problem in enumerate(five_models.load_problems("dip", model, kind))
    ]


def limited_cases(
    batches: Sequence[tuple[str, Problem]], part: float, search: Search
) -> Iterator[Case]:
    """Every batch with ``part`` of its limit, or of what its plan without one takes if less."""
    for name, problem in batches:
        free = with_limits(problem, [UNLIMITED_BYTES] * problem.num_ranks)
        unlimited = plan(chosen_table(name, free, folder=search.partitions), search)
        pairs = zip(unlimited.peak_bytes, problem.memory_limit_bytes, strict=True)
        limits = [int(part * min(pair)) for pair in pairs]
        yield Case(name, with_limits(problem, limits), unlimited)


def variants_of(links: Sequence[float], hosts: Sequence[float]) -> list[Variant]:
    """All that a batch is planned with; ``links`` in GB/s, ``hosts`` in GB."""
    return [
        Variant("recomputing"),
        *(
            Variant(f"{link:g} GB/s, host {host:g} GB", (link, host))
            for link in links
            for host in hosts
        ),
        Variant("cut for the limit", suffix=LOW_MEMORY),
        Variant("holding back", memory_program=False),
    ]


def run_variant(case: Case, variant: Variant, search: Search) -> tuple[str, float | None]:
    """The cell of a batch, and its time over that without a limit, where it has one."""
    if variant.suffix and not kept_partition(case.name, variant.suffix, search.partitions).exists():
        return "none kept", None
    problem = case.limited
    if variant.link is not None:
        problem = with_link(problem, *variant.link)
    table = chosen_table(case.name, problem, variant.suffix, search.partitions)
    try:
        found = plan(table, search, variant.memory_program)
    except InfeasibleError:
        return "does not fit", None
    ratio = found.makespan_us / case.unlimited.makespan_us
    cell = f"{ratio:.3f}"
    if found.recompute_part:
        cell += f", {found.recompute_part:.1%}"
    if found.host_peak_bytes:
        cell += f", {found.host_peak_bytes / 1e9:.0f} GB"
    return cell, ratio


def mean_of(ratios: Sequence[float | None]) -> str:
    """Nothing where a batch has none: a mean over the others would flatter."""
    there = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.mean(there):.3f}" if len(there) == len(ratios) else ""


def print_table(cases: Iterator[Case], variants: Sequence[Variant], search: Search) -> None:
    """One line per batch, and the means per model."""
    printed = Table("problem", "limit, GB", *(variant.title for variant in variants))
    ratios: dict[str, list[list[float | None]]] = defaultdict(list)
    for case in cases:
        cells = [run_variant(case, variant, search) for variant in variants]
        limits = case.limited.memory_limit_bytes
        span = f"{min(limits) / 1e9:.1f} - {max(limits) / 1e9:.1f}"
        printed.add_row(case.name, span, *(text for text, _ in cells))
        ratios[model_of(case.name)].append([ratio for _, ratio in cells])
    for model, rows in ratios.items():
        printed.add_row(f"{model}, mean", "", *map(mean_of, zip(*rows, strict=True)))
    Console(width=180).print(printed)


def main() -> None:
    """Print the table, or write limited fit problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="with *-test-*.json; DIP's if none")
    parser.add_argument("--models", nargs="*", choices=list(five_models.MODELS), help="of DIP's")
    parser.add_argument(
        "--part", type=float, default=0.6, help="of the limit, or what a plan takes"
    )
    parser.add_argument(
        "--link-gb-per-s", type=float, nargs="*", default=[50.0, 12.5], help="of a rank to its host"
    )
    parser.add_argument(
        "--host-gb", type=float, nargs="*", default=[256.0, 32.0], help="of the host, per rank"
    )
    parser.add_argument("--budget-ms", type=float, default=1000.0, help="per plan")
    parser.add_argument("--evaluations", type=int, help="per plan, instead of a time")
    parser.add_argument("--workers", type=int, default=1, help="searches at the same time")
    parser.add_argument("--partitions", type=Path, help="folder of cuts")
    parser.add_argument("--write-fit", type=Path, help="where *-fit-*.json go, limited")
    arguments = parser.parse_args()
    budget = Budget(milliseconds=arguments.budget_ms)
    if arguments.evaluations is not None:
        budget = Budget(evaluations=arguments.evaluations)
    is_dip = arguments.folder is None
    if arguments.models and not is_dip:
        parser.error("--models beside a folder: its problems are all planned")
    own = five_models.PARTITIONS["dip"] if is_dip else PARTITIONS
    search = Search(budget, arguments.workers, arguments.partitions or own)
    kind = "fit" if arguments.write_fit else "test"
    batches = load_batches(arguments.folder, arguments.models or list(five_models.MODELS), kind)
    if not batches:
        parser.error(f"{arguments.folder} holds no *-{kind}-*.json problems")
    # Compiling, or reading what was compiled, is no part of the budget.
    name, first = batches[0]
    for problem in (with_limits(first, [1 << 34] * first.num_ranks), with_link(first, 50, 256)):
        search_schedule(chosen_table(name, problem, folder=search.partitions), evaluations=90)
    cases = limited_cases(batches, arguments.part, search)
    if not arguments.write_fit:
        effort = budget.evaluations or f"{budget.milliseconds:g} ms"
        print(
            f"{datetime.now(UTC).date()}: time over that without a limit, part of all ranks' time "
            f"that recomputes, most memory of a host; limits {arguments.part:.0%} of the batch's "
            f"own, or of the memory without one if less; {effort} per plan"
        )
        print_table(cases, variants_of(arguments.link_gb_per_s, arguments.host_gb), search)
        return
    arguments.write_fit.mkdir(parents=True, exist_ok=True)
    for case in cases:
        (arguments.write_fit / f"{case.name}.json").write_text(case.limited.model_dump_json())


if __name__ == "__main__":
    main()
