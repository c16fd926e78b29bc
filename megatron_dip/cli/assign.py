"""``megatron-dip assign``: a global batch divided anew among replicas and microbatches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_dip.assignment import (
    Assignment,
    Groups,
    Limits,
    assign,
    assigned_problems,
    batch_groups,
    measure_spread,
)
from megatron_dip.assignment.assign import MICROBATCH_TOLERANCE, TOLERANCE
from megatron_dip.cli.output import write_file
from megatron_dip.cli.unread import refuse_unread
from megatron_dip.errors import ConfigError, shown
from megatron_dip.workload import Problem, load_problem

__all__ = ["assign_items"]


def assign_items(
    context: typer.Context,
    problem: Annotated[
        list[Path], typer.Argument(help="Batch problems (JSON), one per data-parallel replica.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the new ones, under the same names.")
    ],
    between_replicas_only: Annotated[
        bool,
        typer.Option(
            "--between-replicas-only", help="Leave microbatches of a replica as they are."
        ),
    ] = False,
    within: Annotated[
        bool, typer.Option("--within", help="Move nothing from one replica to another.")
    ] = False,
    max_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="MODULE=TOKENS: most of a microbatch; may be repeated.  As many as the fullest "
            "holds where not given."
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes that a microbatch may keep for its backward, on all ranks together.  As "
            "many as the largest keeps where not given."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Of the mean time: what the slowest replica may be above it.")
    ] = TOLERANCE,
    microbatch_tolerance: Annotated[
        float, typer.Option(help="Of the mean time: what a microbatch may be off.")
    ] = MICROBATCH_TOLERANCE,
) -> None:
    """Move samples between microbatches and replicas of a batch, until all have as much work."""
    if between_replicas_only and within:
        raise ConfigError(
            "--between-replicas-only and --within leave nothing to move (give one of them, or none)"
        )
    if within:
        refuse_unread(context, ("tolerance",), "beside --within, by which no replica changes")
    if between_replicas_only:
        refuse_unread(
            context,
            ("microbatch_tolerance",),
            "beside --between-replicas-only, by which microbatches of a replica are not evened out",
        )
    if len(problem) == 1:
        refuse_unread(
            context,
            ("between_replicas_only", "tolerance"),
            "with one problem: give one per replica",
        )
    _check_names(problem)
    problems = [load_problem(path) for path in problem]
    groups, members = batch_groups(problems)
    names = problems[0].module_order
    made = assign(
        groups,
        [each.num_microbatches for each in problems],
        limits=Limits(tokens=_token_limits(max_tokens or [], names), kept_bytes=max_bytes),
        between=not within,
        within=not between_replicas_only,
        tolerance=tolerance,
        microbatch_tolerance=microbatch_tolerance,
    )
    write_file(output, lambda: output.mkdir(parents=True, exist_ok=True), quiet=True)
    written = assigned_problems(problems, members, made)
    for path, each in zip(problem, written, strict=True):
        _write(output / path.name, each)
    typer.echo(f"wrote {len(written)} problems to {output}")
    _print(groups, made, problems)


def _write(path: Path, problem: Problem) -> None:
    # Checked as what a user gives: what was moved must still be a problem.
    checked = Problem.model_validate(problem.model_dump())
    text = checked.model_dump_json(exclude_none=True) + "\n"
    write_file(path, lambda: path.write_text(text), quiet=True)


def _check_names(paths: Sequence[Path]) -> None:
    names = [path.name for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"several problems are called {shown(twice[0])} (expected other names: all are written "
            f"into one folder)"
        )


def _token_limits(entries: Sequence[str], names: Sequence[str]) -> list[int | None]:
    limits: list[int | None] = [None] * len(names)
    for entry in entries:
        module, _, tokens = entry.partition("=")
        if module not in names or not tokens.isdecimal():
            raise ConfigError(
                f"--max-tokens {shown(entry)} (expected MODULE=TOKENS with one of {list(names)})"
            )
        if limits[names.index(module)] is not None:
            raise ConfigError(f"--max-tokens {shown(entry)}: {module} has one already (give one)")
        limits[names.index(module)] = int(tokens)
    return limits


def _print(groups: Groups, made: Assignment, problems: Sequence[Problem]) -> None:
    """How unequal replicas and microbatches were, and are."""
    names = problems[0].module_order
    counts = [problem.num_microbatches for problem in problems]
    first = [sum(counts[:number]) for number in range(len(counts))]
    table = Table("", "slowest over mean", *(f"{name} alone" for name in names), "deviation")
    for title, replica, microbatch in (
        ("before", groups.replica, groups.microbatch),
        ("after", made.replica, made.microbatch),
    ):
        slots = [first[r] + m for r, m in zip(replica.tolist(), microbatch.tolist(), strict=True)]
        for what, places, count in (
            ("replicas", replica.tolist(), len(problems)),
            ("microbatches", slots, sum(counts)),
        ):
            spread = measure_spread(groups.time_us, places, count)
            table.add_row(
                f"{what}, {title}",
                f"{spread.slowest:.4f}",
                *(f"{value:.4f}" for value in spread.slowest_modules),
                f"{spread.deviation:.2%}",
            )
    Console().print(table)
    for text, moved in (
        ("to other replicas", made.between),
        ("to other microbatches of their replica", made.within),
    ):
        typer.echo(
            f"moved {text}: {moved.groups} of {len(groups.replica)} groups, {moved.items} items, "
            f"{moved.num_bytes / 1e6:.1f} MB between layers"
        )
