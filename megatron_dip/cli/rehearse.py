"""``megatron-dip rehearse``: run a plan on processes of this machine, computing by sleeping."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_dip.cli.output import write_file
from megatron_dip.plan.plan import load_plan
from megatron_dip.rehearsal import (
    Rehearsal,
    measured_rehearsal_panel,
    rehearsal_json,
    rehearse,
)
from megatron_dip.simulator.chrome_trace import write_chrome_trace
from megatron_dip.simulator.timeline import plan_panel, write_timeline

__all__ = ["rehearse_plan"]


def rehearse_plan(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    time_scale: Annotated[float, typer.Option(help="Factor of all computing times.")] = 1.0,
    transfer_scale: Annotated[
        float, typer.Option(help="Factor of the bytes of all transfers.")
    ] = 1.0,
    repetitions: Annotated[int, typer.Option(help="Runs; their median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Measured and predicted timeline (HTML).")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="The same as a Chrome trace (JSON).")] = None,
) -> None:
    """Run a plan through the real executor and transfers, with sleeping for computing."""
    loaded = load_plan(plan)
    found = rehearse(
        loaded, time_scale=time_scale, transfer_scale=transfer_scale, repetitions=repetitions
    )
    if as_json:
        typer.echo(json.dumps(rehearsal_json(found), indent=1))
    else:
        _print_table(found)
    panels = [
        measured_rehearsal_panel(found, f"{plan.stem}: rehearsed"),
        plan_panel(found.plan, f"{plan.stem}: predicted"),
    ]
    if html is not None:
        write_file(html, lambda: write_timeline(html, plan.stem, panels), quiet=as_json)
    if trace is not None:
        write_file(trace, lambda: write_chrome_trace(trace, panels), quiet=as_json)


def _print_table(found: Rehearsal) -> None:
    table = Table("rank", "predicted", "achieved", "ratio")
    rows = zip(found.predicted_rank_us, found.achieved_rank_us, strict=True)
    named = [(str(rank), *times) for rank, times in enumerate(rows)]
    for name, predicted, achieved in [*named, ("makespan", found.predicted_us, found.achieved_us)]:
        table.add_row(
            name,
            f"{predicted / 1000:.1f} ms",
            f"{achieved / 1000:.1f} ms",
            f"{achieved / predicted:.3f}" if predicted else "-",
        )
    Console().print(table)
    runs = ", ".join(f"{makespan / 1000:.1f}" for makespan in found.repetitions_us)
    typer.echo(f"makespan of every repetition, ms: {runs}")
