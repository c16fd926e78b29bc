"""The command that starts a run on a cluster, made from its configurations.

All checks that need no GPU come first: sizes that do not divide, flags that contradict the cluster.
Flags that Megatron must be given are stated here; what the caller states comes last and as it is.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dip.config import DipConfig
from megatron_dip.costs.machine import ClusterConfig
from megatron_dip.errors import ConfigError, shown
from megatron_dip.reading import read_yaml

__all__ = ["GPU_ENVIRONMENT", "LaunchLine", "connections_for", "launch_line"]

GPU_ENVIRONMENT = {
    "CUDA_MODULE_LOADING": "EAGER",
    "NCCL_DEBUG": "WARN",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
"""As ``scripts/slurm/common.sh`` sets it."""
_CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
_DEFAULTS = {"--micro-batch-size": "1", "--train-iters": "100", "--lr": "1e-4"}
_MICROBATCHES = 16
"""Of every replica, where nothing is said of the batch."""
_SBATCH = "scripts/slurm/train.sbatch"
_DIVIDED = {
    "tensor_parallel": ("num_attention_heads", "num_query_groups", "ffn_hidden_size"),
    "expert_parallel": ("num_experts",),
}
"""Fields of a model's configuration that a size of the cluster must divide."""


@dataclass(frozen=True, kw_only=True)
class LaunchLine:
    """One command, and what to know of it."""

    environment: Mapping[str, str]
    words: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """As a shell reads it, over several lines: one for every flag with its values."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines = [" ".join([*words, shlex.quote(self.words[0])])]
        for word in self.words[1:]:
            quoted = shlex.quote(word)
            starts = word.startswith("-") and not _is_number(word)
            if starts or len(lines[-1]) + len(quoted) > 100:
                lines.append(quoted)
            else:
                lines[-1] += f" {quoted}"
        return " \\\n    ".join(lines)


def launch_line(
    cluster: ClusterConfig,
    script: str,
    further: Sequence[str],
    *,
    config: Path | None = None,
    on_cpu: bool = False,
    rendezvous: str | None = None,
    slurm: bool = False,
    with_apex: bool = False,
) -> LaunchLine:
    """The command for ``script`` on ``cluster``.

    Args:
        further: The caller's own arguments of the script.
        config: The file of ``--dip-config``.
        on_cpu: Ranks of one machine, over gloo, in place of GPUs.
        rendezvous: HOST:PORT where several nodes meet; SLURM's script finds its own.
        slurm: For ``sbatch`` in place of ``torchrun``.
        with_apex: NVIDIA's apex is installed on the cluster.

    Raises:
        ConfigError: Sizes do not fit each other, or ``further`` contradicts them.
    """
    num_nodes, ranks = _nodes(cluster)
    if rendezvous is not None and (slurm or num_nodes == 1):
        reason = "nodes of --slurm find each other" if slurm else "one node needs none"
        raise ConfigError(f"--rendezvous {shown(rendezvous)}: {reason}: leave it out")
    if with_apex and on_cpu:
        raise ConfigError("--apex with --cpu: its fusion needs GPUs: leave one of them out")
    if not Path(script).is_file():
        raise ConfigError(f"there is no script {shown(script)}: give the path of a file")
    if config is not None:
        _check_config(config, cluster)
    arguments = _megatron_arguments(
        cluster, further, config=config, on_cpu=on_cpu, with_apex=with_apex
    )
    notes = _notes(cluster, arguments)
    if slurm:
        if config is None or on_cpu:
            raise ConfigError(
                f"--slurm: {_SBATCH} needs --config FILE, and GPUs (without --slurm the command "
                f"for torchrun is printed)"
            )
        # The script states the schedule and its configuration by itself.
        rest = arguments[arguments.index(str(config)) + 1 :]
        words = (
            *("sbatch", f"--nodes={num_nodes}", f"--gpus-per-node={ranks}"),
            *(f"--export=ALL,DIP_SCRIPT={script}", _SBATCH, str(config), *rest),
        )
        return LaunchLine(environment={}, words=words, notes=notes)
    if on_cpu and num_nodes > 1:
        raise ConfigError(
            f"--cpu: {num_nodes} nodes, but ranks on CPUs are started on one machine (give "
            f"--gpus-per-node {cluster.num_gpus})"
        )
    if num_nodes > 1:
        host, _, port = (rendezvous or "").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"{num_nodes} nodes and --rendezvous {shown(rendezvous)}: give HOST:PORT of one of "
                f"them, e.g. --rendezvous node01:29500, or --slurm"
            )
        start = [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
        notes = (*notes, f"start the same command on each of the {num_nodes} nodes")
    else:
        start = ["--standalone"]
    return LaunchLine(
        environment=_CPU_ENVIRONMENT
        if on_cpu
        else {"CUDA_DEVICE_MAX_CONNECTIONS": connections_for(cluster), **GPU_ENVIRONMENT},
        words=(
            *("torchrun", *start, f"--nproc-per-node={ranks}", "-m", "megatron_dip.launch"),
            *(("--cpu", "--pin") if on_cpu else ()),
            *(script, *arguments),
        ),
        notes=notes,
    )


def connections_for(cluster: ClusterConfig) -> str:
    """Of ``CUDA_DEVICE_MAX_CONNECTIONS``: one hardware queue where Megatron asserts it on GPUs
    before Blackwell, which all presets are; else one for every stream."""
    return "1" if cluster.tensor_parallel > 1 or cluster.context_parallel > 1 else "32"


def _nodes(cluster: ClusterConfig) -> tuple[int, int]:
    """Number of nodes, and ranks of each."""
    ranks = min(cluster.num_gpus, cluster.gpus_per_node)
    if cluster.num_gpus % ranks:
        raise ConfigError(
            f"num_gpus {cluster.num_gpus} is not a multiple of gpus_per_node {ranks}: every node "
            f"gets as many ranks (give --gpus {cluster.num_gpus // ranks * ranks}, or another "
            f"--gpus-per-node)"
        )
    return cluster.num_gpus // ranks, ranks


def _check_config(path: Path, cluster: ClusterConfig) -> None:
    """What the file says of pipeline ranks and of the model, against the cluster."""
    data = read_yaml(path)
    own = {name: value for name, value in data.items() if name in DipConfig.model_fields}
    schedule = DipConfig.parse(own, ConfigError, str(path)).schedule
    if schedule.num_ranks not in (None, cluster.pipeline_parallel):
        raise ConfigError(
            f"{path}: schedule.num_ranks is {schedule.num_ranks}, but pipeline_parallel is "
            f"{cluster.pipeline_parallel} (give --pipeline-parallel {schedule.num_ranks}, or "
            f"choose another cut with megatron-dip partition)"
        )
    for name, value in _numbers(data.get("model"), "model"):
        for size, fields in _DIVIDED.items():
            divisor: int = getattr(cluster, size)
            if name.rpartition(".")[2] in fields and value % divisor:
                option = "--" + size.replace("_", "-")
                raise ConfigError(
                    f"{path}: {size} {divisor} does not divide {name} {value} (give {option} "
                    f"{_largest_divisor(value, divisor)})"
                )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """All whole numbers inside mappings, by their dotted names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(entry, f"{name}.{key}")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _largest_divisor(value: int, most: int) -> int:
    return next(number for number in range(most, 0, -1) if value % number == 0)


def _megatron_arguments(
    cluster: ClusterConfig,
    further: Sequence[str],
    *,
    config: Path | None,
    on_cpu: bool,
    with_apex: bool,
) -> list[str]:
    stated: dict[str, str | None] = {}
    """By flag its value; None for one without."""
    stated["--dip-schedule"] = None
    if config is not None:
        stated["--dip-config"] = str(config)
    stated["--tensor-model-parallel-size"] = str(cluster.tensor_parallel)
    stated["--pipeline-model-parallel-size"] = str(cluster.pipeline_parallel)
    stated["--context-parallel-size"] = str(cluster.context_parallel)
    stated["--expert-model-parallel-size"] = str(cluster.expert_parallel)
    if cluster.sequence_parallel and cluster.tensor_parallel > 1:
        stated["--sequence-parallel"] = None
    if cluster.distributed_optimizer and cluster.data_parallel > 1:
        stated["--use-distributed-optimizer"] = None
    given = {word.partition("=")[0] for word in further if word.startswith("--")}
    if "--dip-config" in given:
        raise ConfigError("--dip-config after --: give it as --config before, which is checked")
    if not on_cpu and not given & {"--bf16", "--fp16"}:
        stated["--bf16"] = None
    if not on_cpu and not with_apex:
        stated["--no-gradient-accumulation-fusion"] = None
    for name in given & set(stated):
        wanted = stated[name]
        if wanted is not None and _value_of(further, name) != wanted:
            raise ConfigError(
                f"{name} {_value_of(further, name)} after --, but the cluster and its options say "
                f"{wanted}: change one of them"
            )
    defaults = {**_DEFAULTS, "--global-batch-size": str(_batch(cluster, further))}
    if "--train-samples" in given:
        del defaults["--train-iters"]
    stated |= defaults
    # Sizes of 1 are Megatron's defaults; said once, for tensor and pipeline.
    plain = {"--context-parallel-size", "--expert-model-parallel-size"}
    return [
        *(
            word
            for name, value in stated.items()
            if name not in given and not (name in plain and value == "1")
            for word in (name, value)
            if word is not None
        ),
        *further,
    ]


def _batch(cluster: ClusterConfig, further: Sequence[str]) -> int:
    """Samples of a step, checked against the replicas."""
    size = _whole("--micro-batch-size", _value_of(further, "--micro-batch-size") or "1")
    least = size * cluster.data_parallel
    given = _value_of(further, "--global-batch-size")
    batch = least * _MICROBATCHES if given is None else _whole("--global-batch-size", given)
    if batch % least:
        raise ConfigError(
            f"--global-batch-size {batch} is not a multiple of {least}, micro-batch-size {size} x "
            f"{cluster.data_parallel} replicas (give {max(1, batch // least) * least})"
        )
    return batch


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{name} {shown(text)}: expected a whole number above 0")
    return int(text)


def _value_of(words: Sequence[str], name: str) -> str | None:
    """Of the last mention of a flag, as the parser takes it; None where there is none."""
    found = None
    for at, word in enumerate(words):
        flag, has_value, value = word.partition("=")
        if flag == name:
            found = value if has_value else next(iter(words[at + 1 : at + 2]), "")
    return found


def _is_number(word: str) -> bool:
    return word[1:2].isdecimal() or word[1:2] == "."


def _notes(cluster: ClusterConfig, arguments: Sequence[str]) -> tuple[str, ...]:
    notes = [
        f"{cluster.num_gpus} ranks: {cluster.data_parallel} replicas of tensor "
        f"{cluster.tensor_parallel} x context {cluster.context_parallel} x pipeline "
        f"{cluster.pipeline_parallel}"
    ]
    inside = cluster.tensor_parallel * cluster.context_parallel
    if cluster.num_gpus > cluster.gpus_per_node and cluster.gpus_per_node % inside:
        notes.append(
            f"tensor x context parallelism of {inside} does not divide the {cluster.gpus_per_node} "
            f"GPUs of a node: layers would talk over the network in every step"
        )
    if "--no-gradient-accumulation-fusion" in arguments:
        notes.append("where NVIDIA's apex is installed, --apex leaves its fusion on")
    return tuple(notes)
