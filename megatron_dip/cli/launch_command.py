"""``megatron-dip launch-cmd``: print the command that starts a run on a cluster."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_dip.cli.launch_line import launch_line
from megatron_dip.costs.machine import ClusterConfig
from megatron_dip.errors import ConfigError
from megatron_dip.reading import read_yaml

__all__ = ["print_launch_command"]


def print_launch_command(
    script: Annotated[
        list[str] | None, typer.Argument(help="After --: the script and further arguments.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster (YAML); the options below win over it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Schedule, and the model where the script reads it (YAML).")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all, or ranks on CPUs.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a node.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Ranks that share a layer.")] = None,
    context_parallel: Annotated[
        int | None, typer.Option(help="Ranks that share a sequence.")
    ] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Ranks of a pipeline.")] = None,
    expert_parallel: Annotated[int | None, typer.Option(help="Ranks that share experts.")] = None,
    rendezvous: Annotated[
        str | None, typer.Option(help="HOST:PORT where several nodes meet.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="For sbatch.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="On a core each, not on GPUs.")] = False,
    apex: Annotated[bool, typer.Option("--apex", help="NVIDIA's apex is installed there.")] = False,
) -> None:
    """Print the command that starts a script on a cluster; sizes are checked before."""
    if not script:
        raise ConfigError(
            "-- SCRIPT [ARGUMENTS]: expected the pretrain script and what it is to be told"
        )
    options = {
        "num_gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "tensor_parallel": tensor_parallel,
        "context_parallel": context_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
    }
    line = launch_line(
        _cluster(cluster, options),
        script[0],
        script[1:],
        config=config,
        on_cpu=cpu,
        rendezvous=rendezvous,
        slurm=slurm,
        with_apex=apex,
    )
    for note in line.notes:
        typer.echo(f"# {note}", err=True)
    typer.echo(str(line))


def _cluster(path: Path | None, options: dict[str, int | None]) -> ClusterConfig:
    data: dict[str, Any] = {"name": "launch-cmd", "gpu": "H100"}
    if path is not None:
        data = dict(read_yaml(path))
    data |= {name: value for name, value in options.items() if value is not None}
    if path is None and not {"num_gpus", "pipeline_parallel"} <= set(data):
        raise ConfigError(
            "--cluster FILE, or --gpus and --pipeline-parallel: expected the size of the cluster"
        )
    return ClusterConfig.parse(data, ConfigError, str(path or "options"))
