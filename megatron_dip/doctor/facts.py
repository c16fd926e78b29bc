"""What is known of a machine and of the run meant for it; plain data, made by hand in tests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Facts", "Gpu", "Machine", "Port", "Run"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that is meant; what a row says depends on it."""

    on_cpu: bool = False
    num_nodes: int = 1
    ranks_per_node: int | None = None
    """As many as there are GPUs where not given; one on CPUs."""
    tensor_parallel: int = 1
    context_parallel: int = 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What another process said: its findings, or why there are none."""

    found: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device as the driver's own tool names it."""

    name: str
    driver: str
    memory_mib: int
    capability: tuple[int, int] | None
    """Compute capability; None where the tool is too old to tell."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of an InfiniBand or RoCE adapter."""

    device: str
    is_active: bool
    rate: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the operating system tells; bytes unless named otherwise."""

    python: tuple[int, int, int]
    executable: str
    cores: tuple[int, ...]
    """Those that this process may run on."""
    quota_cores: float | None
    """Of a container's time limit; None where there is none."""
    numa_nodes: Mapping[int, tuple[int, ...]]
    """Cores of each; empty where the system does not tell."""
    memory_bytes: int
    memory_limit_bytes: int | None
    """Of a container; None where there is none."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None where there is none that can be written to."""
    open_files: int
    locked_memory_bytes: int | None
    """The most that may be locked; None: no limit."""
    programs: Mapping[str, str | None]
    """Where PATH finds each."""
    ports: tuple[Port, ...]
    host_addresses: tuple[str, ...]
    """Of this host's own name; empty where it cannot be resolved."""
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that rows are made from."""

    run: Run
    machine: Machine
    gpus: tuple[Gpu, ...]
    gpu_failure: str | None
    """Why ``gpus`` is empty."""
    topology: str | None
    """What ``nvidia-smi topo -m`` prints."""
    torch: Answer
    megatron: Answer
    transformer_engine: Answer
    apex: Answer
    code_cache: Answer

    @property
    def num_ranks(self) -> int:
        """Of this node."""
        return self.run.ranks_per_node or (1 if self.run.on_cpu else max(1, len(self.gpus)))
