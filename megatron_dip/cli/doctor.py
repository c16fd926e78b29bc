"""``megatron-dip doctor``: what this machine brings for training, and what to mend."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dip.cli.unread import refuse_unread
from megatron_dip.costs import load_cluster
from megatron_dip.doctor import Row, State, examine, gather, worst_state
from megatron_dip.doctor.facts import Run
from megatron_dip.limits import check_range

__all__ = ["examine_machine"]

_STYLES = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}
_MOST_SECONDS = 600.0
_MOST_RANKS = 1024


def examine_machine(
    context: typer.Context,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster (YAML): its nodes, ranks and division.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks of this node; one for every GPU if not given.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Size of tensor parallelism.")] = 1,
    context_parallel: Annotated[int, typer.Option(help="Size of context parallelism.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes of the run.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a run on CPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    limit_seconds: Annotated[
        float, typer.Option(help="The longest that one package may take to import.")
    ] = 120.0,
) -> None:
    """Examine this machine: packages, GPUs, links, cores, limits, environment; 1 on a problem."""
    check_range("--limit-seconds", limit_seconds, 1, _MOST_SECONDS)
    given = {
        "--ranks": ranks,
        "--tensor-parallel": tensor_parallel,
        "--context-parallel": context_parallel,
        "--nodes": nodes,
    }
    for name, value in given.items():
        if value is not None:
            check_range(name, value, 1, _MOST_RANKS)
    if cluster is not None:
        sizes = ("ranks", "tensor_parallel", "context_parallel", "nodes")
        refuse_unread(context, sizes, "beside --cluster: give one or the other")
        run = _run_of(cluster, cpu)
    else:
        run = Run(
            on_cpu=cpu,
            num_nodes=nodes,
            ranks_per_node=ranks,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
        )
    rows = examine(gather(run, limit_seconds))
    if as_json:
        _print_json(rows)
    else:
        _print_table(rows)
    if worst_state(rows) is State.PROBLEM:
        raise typer.Exit(1)


def _run_of(path: Path, on_cpu: bool) -> Run:
    cluster = load_cluster(path)
    ranks = min(cluster.num_gpus, cluster.gpus_per_node)
    return Run(
        on_cpu=on_cpu,
        num_nodes=-(-cluster.num_gpus // ranks),
        ranks_per_node=ranks,
        tensor_parallel=cluster.tensor_parallel,
        context_parallel=cluster.context_parallel,
    )


def _print_json(rows: list[Row]) -> None:
    typer.echo(
        json.dumps({"state": worst_state(rows), "rows": [row._asdict() for row in rows]}, indent=1)
    )


def _print_table(rows: list[Row]) -> None:
    console = Console()
    if console.is_terminal:
        table = Table("", "what", "found", "what to do", show_lines=True)
        for row in rows:
            style = _STYLES[row.state]
            state = f"[{style}]{row.state}[/{style}]"
            table.add_row(state, *map(escape, (row.name, row.found, row.remedy)))
        console.print(table)
    else:
        for row in rows:
            typer.echo(f"{row.state:8} {row.name}: {row.found}")
            if row.remedy:
                typer.echo(f"{'':8} -> {row.remedy}")
    counts = {state: sum(row.state is state for row in rows) for state in State}
    typer.echo(", ".join(f"{count} {state}" for state, count in counts.items()))
