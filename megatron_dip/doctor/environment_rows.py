"""Rows about variables of the environment that change how a run behaves."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_dip.doctor.facts import Facts
from megatron_dip.doctor.rows import Row, State, ok, warning

__all__ = ["environment_rows"]

_SHOWN_PREFIXES = ("CUDA_", "GLOO_", "NCCL_", "NUMBA_", "NVTE_", "PYTORCH_", "TORCH_")
_SHOWN = ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "PYTHONHOME", "PYTHONPATH")
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class _Rule(NamedTuple):
    """A variable whose value does harm."""

    name: str
    is_bad: Callable[[str], bool]
    state: State
    consequence: str
    remedy: str


def _is_on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


_RULES = (
    _Rule(
        "CUDA_LAUNCH_BLOCKING",
        _is_on,
        State.PROBLEM,
        "every transfer holds the host until its peer has come, and receives are posted ahead: "
        "ranks wait for each other",
        "unset it",
    ),
    _Rule(
        "TORCH_NCCL_BLOCKING_WAIT",
        _is_on,
        State.WARNING,
        "every wait for a message holds the host, so that no kernel is launched ahead",
        "unset it",
    ),
    _Rule(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        lambda value: value.strip() == "0",
        State.WARNING,
        "where a rank has died, the others wait in their collectives for ever",
        "unset it, or set it to 1",
    ),
    _Rule(
        "TORCH_DISTRIBUTED_DEBUG",
        lambda value: value.strip().upper() == "DETAIL",
        State.WARNING,
        "every collective is checked by another one first",
        "unset it once the fault is found",
    ),
    _Rule(
        "NCCL_P2P_DISABLE",
        _is_on,
        State.WARNING,
        "GPUs of a node do not use NVLink",
        "unset it",
    ),
    _Rule(
        "NCCL_SHM_DISABLE",
        _is_on,
        State.WARNING,
        "GPUs of a node without NVLink talk over the network",
        "unset it",
    ),
)


def environment_rows(facts: Facts) -> list[Row]:
    """What is set that matters, and a row for each setting that does harm."""
    environment = facts.machine.environment
    shown = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if name in _SHOWN or name.startswith(_SHOWN_PREFIXES)
    ]
    rows = [ok("environment", ", ".join(shown) or "nothing set that matters here")]
    if not facts.run.on_cpu:
        rows += [
            Row(rule.name, rule.state, f"{environment[rule.name]}: {rule.consequence}", rule.remedy)
            for rule in _RULES
            if rule.name in environment and rule.is_bad(environment[rule.name])
        ]
        rows += [_module_loading(environment), _allocator(environment)]
    return [*rows, _threads(facts)]


def _module_loading(environment: Mapping[str, str]) -> Row:
    name = "CUDA_MODULE_LOADING"
    value = environment.get(name, "")
    if value.strip().upper() == "EAGER":
        return ok(name, value)
    return warning(
        name,
        f"{value or 'not set, which is LAZY'}: loading a kernel at its first use may wait for all "
        "that runs, and receives are posted ahead: ranks could wait for each other",
        "export CUDA_MODULE_LOADING=EAGER",
    )


def _allocator(environment: Mapping[str, str]) -> Row:
    name = "allocator of GPU memory"
    values = [environment[one] for one in _ALLOCATOR if one in environment]
    if any("expandable_segments:true" in value.lower().replace(" ", "") for value in values):
        return ok(name, ", ".join(values))
    return warning(
        name,
        f"{', '.join(values) or 'default'}: sizes that differ from batch to batch leave gaps",
        "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    )


def _threads(facts: Facts) -> Row:
    name, value = "OMP_NUM_THREADS", facts.machine.environment.get("OMP_NUM_THREADS")
    if value is None:
        return ok(name, "not set; torchrun makes it 1 for several ranks")
    num_threads = int(value) if value.isdecimal() else 0
    num_wanted = num_threads * facts.num_ranks
    if num_threads and num_wanted <= max(len(facts.machine.cores), facts.num_ranks):
        return ok(name, value)
    cores = len(facts.machine.cores)
    found = f"{value}: {facts.num_ranks} ranks want {num_wanted} of {cores} cores"
    if not num_threads:
        found = f"{value}: not a number of threads"
    return warning(name, found, "export OMP_NUM_THREADS=1")
