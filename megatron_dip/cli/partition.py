"""``megatron-dip partition``: choose a cut and sub-microbatch sizes from sample batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from megatron_dip.cli.output import write_file
from megatron_dip.cli.unread import refuse_unread
from megatron_dip.errors import ConfigError
from megatron_dip.limits import MOST_MICROBATCHES, check_range
from megatron_dip.partition import load_partition
from megatron_dip.partitioner.choose import ChosenPartition, choose_partition
from megatron_dip.partitioner.cuts import Cut
from megatron_dip.report.recorded import recorded_problems, recorded_steps
from megatron_dip.workload import Problem, load_problem

__all__ = ["make_partition"]


def make_partition(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the partition goes (JSON).")
    ],
    problem: Annotated[
        list[Path] | None, typer.Option(help="Sample batch (JSON) of the model; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="What a run has written to --dip-trace-dir: its own batches."),
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches of the run that are taken.")] = 4,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Cut (JSON) to begin with, for other batches or another memory limit; "
            "else the best even one."
        ),
    ] = None,
    split_backward: Annotated[
        bool, typer.Option("--split-backward", help="Batches will be planned with it.")
    ] = False,
    evaluations: Annotated[
        int | None, typer.Option(help="Schedules that planning a batch will make; or")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            help="how long it will take, counted as --minutes: the longer, the more actions a good "
            "cut may have. Without either 1000."
        ),
    ] = None,
    changes: Annotated[
        int, typer.Option(help="Changes that are tried at most; 0 for none.")
    ] = 1000,
    minutes: Annotated[
        float,
        typer.Option(
            help="About how long it may take on one core of 2.5 GHz; counted in actions that are "
            "put in order, so that every machine chooses the same."
        ),
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the random changes.")] = 0,
) -> None:
    """Choose segments, layers and sub-microbatch sizes for batches like the samples."""
    if folder is None:
        refuse_unread(context, ("batches",), "without --from: batches of --problem are all taken")
    if changes == 0:
        refuse_unread(context, ("seed",), "with --changes 0: nothing is random")
    samples = _samples(problem or [], folder, batches)
    given = None if start is None else load_partition(start)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[cuts]} cuts"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("judging", total=1.0, cuts=0)
        chosen = choose_partition(
            samples,
            start=given,
            split_backward=split_backward,
            evaluations=evaluations,
            budget_ms=budget_ms,
            max_changes=changes,
            seed=seed,
            minutes=minutes,
            progress=lambda step, cuts, share: bar.update(
                task, description=step, completed=share, cuts=cuts
            ),
        )
    write_file(output, lambda: output.write_text(chosen.partition.model_dump_json() + "\n"))
    _print(chosen)


def _samples(paths: Sequence[Path], folder: Path | None, batches: int) -> list[Problem]:
    if bool(paths) == (folder is not None):
        raise ConfigError("--problem or --from: expected one of them (sample batches, or a run)")
    if folder is None:
        return [load_problem(path) for path in paths]
    check_range("--batches", batches, 1, MOST_MICROBATCHES)
    problems, fitted = recorded_problems(recorded_steps(folder), batches)
    for name, module in fitted.items():
        typer.echo(
            f"{name}: times fitted to {module.num_actions} actions of the run, off by "
            f"{module.error:.1%} (median)"
        )
    return problems


def _print(chosen: ChosenPartition) -> None:
    table = Table("module", "segments", "layers per segment and rank", "tokens at most")
    cut = Cut.of(chosen.partition)
    for name, layers in cut.layers.items():
        rows = "\n".join(" ".join(map(str, row)) for row in layers)
        size = cut.sub_microbatch_tokens[name]
        table.add_row(name, str(len(layers)), rows, "not split" if size is None else str(size))
    Console().print(table)
    typer.echo(
        f"useful work on the samples: {chosen.utilisation:.1%} of the ranks' time "
        f"(best of {chosen.num_judged} cuts)"
    )
