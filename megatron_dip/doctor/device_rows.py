"""Rows about GPUs and what links them."""

import re
from collections import Counter

from megatron_dip.doctor.facts import Facts
from megatron_dip.doctor.rows import Row, ok, problem, warning

__all__ = ["device_rows"]

_BLACKWELL = 10
"""Major compute capability from which on Megatron does not ask for one hardware queue."""
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_MOST_CONNECTIONS = 32


def device_rows(facts: Facts) -> list[Row]:
    """Of the devices of this node and the ways to other nodes."""
    return [_gpus(facts), _connections(facts), _links(facts), _network(facts), _host_name(facts)]


def _gpus(facts: Facts) -> Row:
    name, torch = "GPUs", facts.torch.found
    if facts.run.on_cpu:
        return ok(name, "not used")
    if not facts.gpus and not torch.get("num_devices"):
        remedy = "run this on a node with GPUs (srun megatron-dip doctor), or examine for --cpu"
        return problem(name, facts.gpu_failure or "none", remedy)
    kinds = Counter(gpu.name for gpu in facts.gpus)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    driver = facts.gpus[0].driver if facts.gpus else "unknown"
    found = f"{listed or 'unknown'}, driver {driver}"
    if not torch:
        return warning(name, f"{found}; torch cannot be asked", "mend torch first")
    if not torch["num_devices"]:
        return problem(
            name,
            f"{found}, but torch (CUDA {torch['cuda']}) can use none",
            "install a torch for an older CUDA or update the driver; see CUDA_VISIBLE_DEVICES",
        )
    if torch["device_error"]:
        remedy = "look at nvidia-smi: another process may hold the device, or it needs a reset"
        return problem(name, f"{found}; a first kernel failed: {torch['device_error']}", remedy)
    if not _is_built_for(torch["capability"], torch["architectures"]):
        return problem(
            name,
            f"{found}: compute capability {'.'.join(map(str, torch['capability']))}, but torch was "
            f"built for {', '.join(torch['architectures'])}",
            "install a torch that was built for this GPU",
        )
    if torch["num_devices"] < facts.num_ranks:
        return problem(
            name,
            f"{found}; torch sees {torch['num_devices']} for {facts.num_ranks} ranks",
            "one GPU for every rank (NCCL refuses two ranks on one); see CUDA_VISIBLE_DEVICES",
        )
    if len(kinds) > 1:
        return warning(
            name, f"{found}: of different kinds", "plans assume that all ranks are equal"
        )
    return ok(name, found)


def _is_built_for(capability: list[int], architectures: list[str]) -> bool:
    """Code for the same major version runs, and so does the intermediate form of any older one."""
    major, minor = capability
    for entry in architectures:
        kind, _, digits = entry.partition("_")
        numbers = re.match(r"\d+", digits)
        if numbers is None:
            continue
        built = (int(numbers[0][:-1] or 0), int(numbers[0][-1]))
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not architectures


def _connections(facts: Facts) -> Row:
    """How many hardware queues a device has, as the variable says."""
    if facts.run.on_cpu:
        return ok(_CONNECTIONS, "not read on CPUs")
    value = facts.machine.environment.get(_CONNECTIONS)
    found = "not set" if value is None else f"{value}"
    if value is not None and not (value.isdecimal() and 1 <= int(value) <= _MOST_CONNECTIONS):
        return problem(_CONNECTIONS, found, f"a number from 1 to {_MOST_CONNECTIONS}, or unset it")
    capabilities = [gpu.capability[0] for gpu in facts.gpus if gpu.capability is not None]
    is_before_blackwell = min(capabilities, default=0) < _BLACKWELL
    divides_layers = facts.run.tensor_parallel > 1 or facts.run.context_parallel > 1
    if divides_layers and is_before_blackwell and value != "1":
        return problem(
            _CONNECTIONS,
            f"{found}; Megatron asserts 1 for tensor or context parallelism before Blackwell",
            f"export {_CONNECTIONS}=1 (with --overlap-moe-expert-parallel-comm 32 will do)",
        )
    if value == "1" and divides_layers and is_before_blackwell:
        return ok(_CONNECTIONS, "1: plans are made for one hardware queue")
    if value is None or int(value) < _MOST_CONNECTIONS:
        return warning(
            _CONNECTIONS,
            f"{found}: streams share hardware queues, so that a transfer which waits for its peer "
            f"can hold up computing; plans are made for that, and are longer",
            f"export {_CONNECTIONS}={_MOST_CONNECTIONS}; tensor or context parallelism before "
            f"Blackwell asks for 1 (name them: --tensor-parallel, --context-parallel, --cluster)",
        )
    return ok(_CONNECTIONS, f"{found}: a hardware queue for every stream")


def _links(facts: Facts) -> Row:
    name = "links between GPUs"
    if facts.run.on_cpu or len(facts.gpus) < 2:
        return ok(name, "none needed")
    if facts.topology is None:
        return warning(name, "nvidia-smi topo -m tells nothing", "see that GPUs share NVLink")
    pairs = _pairs(facts.topology)
    slow = {pair: kind for pair, kind in pairs.items() if not kind.startswith("NV")}
    if not pairs:
        return warning(name, "nvidia-smi topo -m shows no pair", "see that GPUs share NVLink")
    kinds = ", ".join(f"{kind} x {count}" for kind, count in Counter(pairs.values()).items())
    if slow:
        (first, second), kind = next(iter(slow.items()))
        return warning(
            name,
            f"{kinds}; GPUs {first} and {second} by {kind}, without NVLink",
            "keep tensor parallelism inside groups that share NVLink",
        )
    return ok(name, kinds)


def _pairs(topology: str) -> dict[tuple[int, int], str]:
    """By pair of GPUs what lies between them, from the matrix of ``nvidia-smi topo -m``."""
    # In a terminal the tool underlines its headings.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    found = {}
    for line in plain.splitlines():
        words = line.split()
        if words and (row := re.fullmatch(r"GPU(\d+)", words[0])) and "X" in words[1:]:
            for column, kind in enumerate(words[1:]):
                if column > int(row[1]) and re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", kind):
                    found[int(row[1]), column] = kind
    # Columns of network adapters follow those of GPUs.
    num_gpus = len(re.findall(r"^GPU\d+", plain, re.M))
    return {pair: kind for pair, kind in found.items() if pair[1] < num_gpus}


def _network(facts: Facts) -> Row:
    name, environment = "network between nodes", facts.machine.environment
    active = [port for port in facts.machine.ports if port.is_active]
    found = (
        ", ".join(f"{port.device} {port.rate}" for port in active) or "no active InfiniBand port"
    )
    if facts.run.on_cpu or facts.run.num_nodes == 1:
        return ok(name, found)
    if not active:
        return warning(
            name,
            f"{found}: NCCL would use TCP",
            "load the adapter's drivers; in a container, pass /dev/infiniband and /sys through; "
            "with TCP on purpose, name the interface in NCCL_SOCKET_IFNAME",
        )
    if environment.get("NCCL_IB_DISABLE", "0") != "0":
        return warning(name, f"{found}, but NCCL_IB_DISABLE is set", "unset NCCL_IB_DISABLE")
    if facts.machine.locked_memory_bytes is not None:
        return warning(
            name,
            f"{found}; no more than {facts.machine.locked_memory_bytes:,} bytes may be locked",
            "ulimit -l unlimited (limits.conf, or of the container): adapters lock their buffers",
        )
    return ok(name, found)


def _host_name(facts: Facts) -> Row:
    """Gloo, over which plans travel, listens where the host's own name leads."""
    name, addresses = "address of this host", facts.machine.host_addresses
    remedy = "name the interface in GLOO_SOCKET_IFNAME (ip -br addr lists them), or mend /etc/hosts"
    interface = facts.machine.environment.get("GLOO_SOCKET_IFNAME")
    if interface:
        return ok(name, f"gloo listens on {interface} (GLOO_SOCKET_IFNAME)")
    is_local = all(address.startswith("127.") or address == "::1" for address in addresses)
    found = ", ".join(addresses) or "its name cannot be resolved"
    if is_local and facts.run.num_nodes > 1:
        return problem(name, f"{found}: other nodes cannot reach it there", remedy)
    return ok(name, found)
