"""``megatron-dip profile``: measure the layers of a model on this machine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from megatron_dip.cli.output import write_file
from megatron_dip.costs.grid import size_grid
from megatron_dip.costs.profile import Profile
from megatron_dip.errors import ConfigError
from megatron_dip.families.configs import load_config
from megatron_dip.families.forms import FamilyConfig

__all__ = ["measure_layers"]


class DeviceChoice(StrEnum):
    """Where layers are measured."""

    CPU = "cpu"
    GPU = "gpu"


class PrecisionChoice(StrEnum):
    """Type of weights and activations."""

    FP32 = "fp32"
    BF16 = "bf16"


class LayersChoice(StrEnum):
    """Whose layers are measured, as ``--transformer-impl`` of the run."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


def measure_layers(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (YAML).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes (JSON).")],
    device: Annotated[DeviceChoice, typer.Option(help="cpu measures one core.")] = DeviceChoice.GPU,
    layers: Annotated[
        LayersChoice | None,
        typer.Option(help="As --transformer-impl; local on cpu, transformer_engine on gpu."),
    ] = None,
    precision: Annotated[
        PrecisionChoice | None, typer.Option(help="fp32 on cpu, bf16 on gpu.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share a layer.")] = 1,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Divide the rows between regions, too.")
    ] = False,
    points: Annotated[int, typer.Option(help="Sizes per curve, smallest to largest.")] = 8,
    repetitions: Annotated[int, typer.Option(help="Most calls per size; the fastest counts.")] = 15,
    time_limit: Annotated[float, typer.Option(help="Seconds for all sizes together.")] = 300.0,
) -> None:
    """Measure layers of every module of a model, for the planner of training."""
    # Known to be right before processes are started.
    _check_measurable(load_config(config))
    size_grid(1, 2, points)
    from megatron_dip.integration.profiling.processes import ProfileTask, measure_profile

    on_cpu = device is DeviceChoice.CPU
    task = ProfileTask(
        config=config,
        device=device.value,
        layers=(layers.value if layers else "local" if on_cpu else "transformer_engine"),
        precision=(precision.value if precision else "fp32" if on_cpu else "bf16"),
        tensor_parallel=tensor_parallel,
        sequence_parallel=sequence_parallel,
        num_points=points,
        repetitions=repetitions,
        seconds=time_limit,
    )
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)
        made = measure_profile(
            task,
            lambda what, total: progress.update(bar, description=what, total=total, advance=1),
        )
    _print_table(made)
    write_file(output, lambda: output.write_text(made.model_dump_json(indent=1) + "\n"))


def _check_measurable(config: FamilyConfig) -> None:
    for module in config.model_shape().modules:
        if module.experts is not None:
            raise ConfigError(
                f"{module.name} has experts, whose layers cannot be measured yet: their time "
                f"depends on where a router sends tokens (train without schedule.costs.profile)"
            )


def _print_table(made: Profile) -> None:
    table = Table(
        "module", "tokens", "forward", "input gradient", "weight gradient", "again", "kept"
    )
    for name, module in made.modules.items():
        for point in (module.linear[0], module.linear[-1]):
            again, kept = point.recompute_us, point.activation_bytes
            table.add_row(
                name,
                str(point.size),
                f"{point.forward_us:.0f} us",
                f"{point.input_grad_us:.0f} us",
                f"{point.weight_grad_us:.0f} us",
                "-" if again is None else f"{again:.0f} us",
                "-" if kept is None else f"{kept / 1e6:.2f} MB",
            )
    Console().print(f"{made.device}: one layer without the core of attention")
    Console().print(table)
