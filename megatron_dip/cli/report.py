"""``megatron-dip report``: a page about a training run."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_dip.cli.output import write_file
from megatron_dip.report import write_report

__all__ = ["report_run"]


def report_run(
    run: Annotated[Path, typer.Argument(help="Folder of --dip-trace-dir, or the one above it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the folder.")
    ] = None,
    replica: Annotated[int, typer.Option(min=0, help="Data-parallel replica.")] = 0,
) -> None:
    """Show a training run: throughput, idle time, prediction, memory, timelines."""
    path = output or run / "report.html"
    write_file(path, lambda: write_report(run, path, replica))
