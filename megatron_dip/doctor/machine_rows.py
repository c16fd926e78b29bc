"""Rows about cores, memory and limits of the system."""

from megatron_dip.doctor.facts import Facts
from megatron_dip.doctor.rows import Row, ok, problem, warning

__all__ = ["machine_rows"]

_GIB = 1024**3
_RANK_GIB = 2
"""What a rank takes of the host's memory at least: libraries, the device's context, batches."""
_PLANNER_GIB = 4
"""``planning.worker_memory_gib`` where a configuration says nothing else."""
_LEAST_SHARED_GIB = 1
_LEAST_FILES = 4096


def machine_rows(facts: Facts) -> list[Row]:
    """What this node gives its ranks and planners."""
    return [_cores(facts), _numa(facts), _memory(facts), _shared_memory(facts), _open_files(facts)]


def _cores(facts: Facts) -> Row:
    name, cores, ranks = "cores for planners", facts.machine.cores, facts.num_ranks
    quota = facts.machine.quota_cores
    usable = len(cores) if quota is None else min(len(cores), int(quota))
    found = f"{usable} cores for {ranks} ranks"
    if quota is not None and quota < len(cores):
        found += f" (the container may use the time of {quota:g})"
    if usable < ranks:
        return warning(
            name,
            f"{found}: ranks wait for each other's cores",
            "ask for more cores (--cpus-per-task), and start ranks with srun --cpu-bind=none",
        )
    if usable == ranks:
        return warning(
            name,
            f"{found}: none left",
            "ask for a core more for every planner process; they are niced, and late where ranks "
            "compute all the time",
        )
    left = cores[ranks:]
    return ok(name, f"{found}; {usable - ranks} left, e.g. --dip-planner-cores {left[0]}")


def _numa(facts: Facts) -> Row:
    name, nodes = "NUMA nodes", facts.machine.numa_nodes
    usable = {node: len(set(cores) & set(facts.machine.cores)) for node, cores in nodes.items()}
    found = ", ".join(f"node {node}: {count} cores" for node, count in usable.items())
    if len(nodes) > 1 and 0 in usable.values():
        empty = [str(node) for node, count in usable.items() if not count]
        return warning(
            name,
            f"{found}; this process may use none of node {', '.join(empty)}",
            "srun --cpu-bind=none, or numactl for every rank: GPUs of that node are far from these "
            "cores",
        )
    return ok(name, found or "the system tells none")


def _memory(facts: Facts) -> Row:
    name, machine = "memory of the host", facts.machine
    limit = min(machine.memory_bytes, machine.memory_limit_bytes or machine.memory_bytes)
    needed_gib = _RANK_GIB * facts.num_ranks + _PLANNER_GIB
    found = f"{limit / _GIB:.0f} GiB"
    if machine.memory_limit_bytes is not None and limit < machine.memory_bytes:
        found += f" (limit of the container; the host has {machine.memory_bytes / _GIB:.0f})"
    if limit < needed_gib * _GIB:
        return warning(
            name,
            f"{found}; {facts.num_ranks} ranks and a planner take about {needed_gib}",
            "ask for more (--mem), or lower planning.worker_memory_gib and --num-workers",
        )
    return ok(name, found)


def _shared_memory(facts: Facts) -> Row:
    name, size = "/dev/shm", facts.machine.shared_memory_bytes
    if size is None:
        remedy = "mount a tmpfs there: loaders and NCCL hand data over through it"
        return problem(name, "cannot be written to", remedy)
    found = f"{size / _GIB:.1f} GiB"
    if size < _LEAST_SHARED_GIB * _GIB:
        return warning(
            name,
            f"{found}; loaders hand batches over through it, NCCL buffers",
            "docker run --ipc=host or --shm-size=16g; --num-workers 0 does without loaders",
        )
    return ok(name, found)


def _open_files(facts: Facts) -> Row:
    name, limit = "open files", facts.machine.open_files
    if limit < _LEAST_FILES:
        return warning(
            name,
            f"at most {limit:,} for a process",
            "ulimit -n 65536: connections to other ranks and tensors of loaders are files",
        )
    return ok(name, f"at most {limit:,} for a process")
