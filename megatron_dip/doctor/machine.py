"""What the operating system and the driver's own tool tell of this machine."""

import os
import resource
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dip.doctor.asking import ask_program
from megatron_dip.doctor.facts import Gpu, Machine, Port
from megatron_dip.errors import DataError
from megatron_dip.reading import read_text

__all__ = ["ask_gpus", "ask_topology", "describe_machine", "parse_cores"]

_PROGRAMS = ("nvidia-smi", "cc", "gcc", "g++", "make")
_GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")


def describe_machine(root: Path = Path("/")) -> Machine:
    """Everything but GPUs; files of the system are read under ``root``."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Machine(
        python=sys.version_info[:3],
        executable=sys.executable,
        cores=cores,
        quota_cores=_quota_cores(root),
        numa_nodes=_numa_nodes(root),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_limit_bytes=_memory_limit_bytes(root),
        shared_memory_bytes=_shared_memory_bytes(root / "dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        programs={name: shutil.which(name) for name in _PROGRAMS},
        ports=_ports(root),
        host_addresses=_host_addresses(),
        environment=dict(os.environ),
    )


def parse_cores(text: str) -> tuple[int, ...]:
    """Numbers in a list of the kernel's such as ``0-3,8``."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            cores += range(int(first), int(last or first) + 1)
    return tuple(cores)


def ask_gpus(limit_seconds: float) -> tuple[tuple[Gpu, ...], str | None]:
    """The devices that the driver shows, and why there are none."""
    if shutil.which("nvidia-smi") is None:
        return (), "nvidia-smi is not on PATH"
    fields = list(_GPU_FIELDS)
    output, failure = _query(fields, limit_seconds)
    if failure is not None:
        # Drivers before 11.6 do not know the compute capability.
        fields.remove("compute_cap")
        output, failure = _query(fields, limit_seconds)
    if failure is not None:
        return (), f"nvidia-smi {failure}"
    gpus = tuple(_gpu(line.split(",")) for line in output.splitlines() if line.strip())
    return gpus, None if gpus else "nvidia-smi shows no GPU"


def _query(fields: Sequence[str], limit_seconds: float) -> tuple[str, str | None]:
    query = f"--query-gpu={','.join(fields)}"
    return ask_program(["nvidia-smi", query, "--format=csv,noheader,nounits"], limit_seconds)


def _gpu(values: Sequence[str]) -> Gpu:
    name, driver, memory, capability = [*map(str.strip, values), "", "", "", ""][:4]
    major, _, minor = capability.partition(".")
    is_known = major.isdecimal() and minor.isdecimal()
    return Gpu(
        name=name,
        driver=driver,
        memory_mib=int(memory) if memory.isdecimal() else 0,
        capability=(int(major), int(minor)) if is_known else None,
    )


def ask_topology(limit_seconds: float) -> str | None:
    """What links GPUs, as the driver's tool draws it; None where it does not."""
    output, failure = ask_program(["nvidia-smi", "topo", "-m"], limit_seconds)
    return output if failure is None else None


def _text(path: Path) -> str | None:
    """What a file of the system says; None where there is none."""
    try:
        return read_text(path, DataError).strip()
    except DataError:
        return None


def _groups(root: Path) -> Mapping[str, str]:
    """By controller the control group of this process; version 2 has one, under an empty name."""
    lines = (_text(root / "proc/self/cgroup") or "").splitlines()
    parts = [line.split(":", 2) for line in lines]
    return {name: part[2] for part in parts if len(part) == 3 for name in part[1].split(",")}


def _group_folders(root: Path, controller: str) -> list[Path]:
    """Folders with limits of this process: of its control group and of those above it, in both
    versions of the system."""
    groups = _groups(root)
    found = []
    for mount, group in (
        (root / "sys/fs/cgroup", groups.get("")),
        (root / "sys/fs/cgroup" / controller, groups.get(controller)),
    ):
        # In a container the group of this process may be mounted as the root of all.
        place = Path((group or "/").lstrip("/"))
        found += [mount / folder for folder in dict.fromkeys((place, *place.parents))]
    return found


def _memory_limit_bytes(root: Path) -> int | None:
    folders = _group_folders(root, "memory")
    names = ("memory.max", "memory.limit_in_bytes")
    texts = [_text(folder / name) or "" for folder in folders for name in names]
    # Version 1 says no limit by a number next to 2^63.
    limits = [int(text) for text in texts if text.isdecimal() and int(text) < 2**60]
    return min(limits, default=None)


def _quota_cores(root: Path) -> float | None:
    found = []
    for folder in _group_folders(root, "cpu"):
        old = [_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        for quota, period in ((_text(folder / "cpu.max") or " ").split(" ")[:2], old):
            if quota.isdecimal() and period.isdecimal() and int(period):
                found.append(int(quota) / int(period))
    return min(found, default=None)


def _numa_nodes(root: Path) -> dict[int, tuple[int, ...]]:
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cores = parse_cores(_text(folder / "cpulist") or "")
        if cores:
            found[int(folder.name.removeprefix("node"))] = cores
    return dict(sorted(found.items()))


def _shared_memory_bytes(folder: Path) -> int | None:
    if not os.access(folder, os.W_OK):
        return None
    size = os.statvfs(folder)
    return size.f_frsize * size.f_blocks


def _soft_limit(kind: int) -> int | None:
    limit = resource.getrlimit(kind)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _ports(root: Path) -> tuple[Port, ...]:
    found = []
    for folder in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        found.append(
            Port(
                device=f"{folder.parent.parent.name}:{folder.name}",
                is_active="ACTIVE" in (_text(folder / "state") or ""),
                rate=_text(folder / "rate") or "unknown rate",
            )
        )
    return tuple(found)


def _host_addresses() -> tuple[str, ...]:
    try:
        entries = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(sorted({str(entry[4][0]) for entry in entries}))
