"""``megatron-dip profile``: times of a model's layers from steps of its own script."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_dip.cli.output import write_file
from megatron_dip.cli.unread import refuse_unread
from megatron_dip.errors import ConfigError
from megatron_dip.limits import check_range
from megatron_dip.report.fit import FittedModule
from megatron_dip.report.local_run import run_local_training
from megatron_dip.report.recorded import fitted_profile

__all__ = ["measure_layers"]

_MOST_STEPS = 20
"""All of them have timelines."""
_STALL_SECONDS = 1800.0
_LEFT_OUT = ("--save", "--tensorboard-dir", "--dip-trace-dir", "--exit-interval")
"""Of the script's arguments, with their values: nothing of these steps is to be kept."""


def measure_layers(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes (JSON).")],
    script: Annotated[
        list[str] | None, typer.Argument(help="After --: the script and its arguments.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="What a run has written to --dip-trace-dir, instead of one."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes of the run, all on this machine.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="On a core each, not on GPUs.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps; the first two warm up.")] = 12,
    replica: Annotated[int, typer.Option(help="Data-parallel replica whose steps count.")] = 0,
) -> None:
    """Measure layers of a model in steps of its own script, for the planner of training."""
    if (folder is None) == (not script):
        raise ConfigError(
            "--from FOLDER or -- SCRIPT ARGUMENTS: expected exactly one of them (the command of a "
            "run, as after megatron_dip.launch, or what one has recorded)"
        )
    if folder is not None:
        refuse_unread(
            context,
            ("ranks", "cpu", "steps"),
            "beside --from, by which nothing is run (leave it out, or give a script)",
        )
    with tempfile.TemporaryDirectory(prefix="megatron-dip-profile-") as own:
        if folder is None:
            assert script
            check_range("--steps", steps, 4, _MOST_STEPS)
            folder = Path(own) / "trace"
            _run(script, folder, ranks=ranks, cpu=cpu, steps=steps)
        profile, fitted = fitted_profile(folder, replica)
    _print(profile.device, fitted)
    write_file(output, lambda: output.write_text(profile.model_dump_json(indent=1) + "\n"))


def _run(script: list[str], folder: Path, *, ranks: int, cpu: bool, steps: int) -> None:
    arguments = [
        *_without(script[1:]),
        *("--exit-interval", str(steps), "--eval-iters", "0"),
        *("--dip-schedule", "--dip-vary-parts", "--dip-trace-dir", str(folder)),
    ]
    with Console(stderr=True).status("starting") as status:
        run_local_training(
            Path(script[0]),
            arguments,
            num_ranks=ranks,
            on_cpu=cpu,
            log=folder.parent / "log.txt",
            stall_seconds=_STALL_SECONDS,
            on_iteration=lambda number, loss: status.update(f"step {number} of {steps}"),
        )


def _without(arguments: list[str]) -> list[str]:
    """``arguments`` without those that keep something of a run."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in _LEFT_OUT:
            is_value = not value
        elif is_value:
            is_value = False
        else:
            kept.append(argument)
    return kept


def _print(device: str, fitted: Mapping[str, FittedModule]) -> None:
    table = Table(
        "module", "calling a layer", "1000 tokens, forward", "backward", "actions", "off by"
    )
    for name, module in fitted.items():
        times = module.times
        table.add_row(
            name,
            f"{times.overhead_us:.0f} us",
            f"{1000 * times.forward.token_us:.0f} us",
            f"{2000 * times.backward.token_us:.0f} us",
            str(module.num_actions),
            f"{module.error:.1%}",
        )
    Console().print(f"{device}: one layer without the core of attention")
    Console().print(table)
