"""The doctor: every row in every state it can have, and how the facts behind rows are read."""

import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_dip.cli import doctor as command
from megatron_dip.cli.main import app
from megatron_dip.doctor import Row, State, examine, gather, worst_state
from megatron_dip.doctor.asking import ask_program, ask_python
from megatron_dip.doctor.facts import Answer, Facts, Gpu, Machine, Port, Run
from megatron_dip.doctor.machine import ask_gpus, ask_topology, describe_machine, parse_cores

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
OK, WARNING, PROBLEM = State.OK, State.WARNING, State.PROBLEM
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-55\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNODE\t0-55\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tSYS\t56-111\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X

Legend:
  X    = Self
"""
MACHINE = Machine(
    python=(3, 12, 4),
    executable="/opt/python",
    cores=tuple(range(112)),
    quota_cores=None,
    numa_nodes={0: tuple(range(56)), 1: tuple(range(56, 112))},
    memory_bytes=1000 * GIB,
    memory_limit_bytes=None,
    shared_memory_bytes=500 * GIB,
    open_files=65536,
    locked_memory_bytes=None,
    programs={"cc": "/usr/bin/cc", "gcc": None, "g++": "/usr/bin/g++", "make": "/usr/bin/make"},
    ports=(Port(device="mlx5_0:1", is_active=True, rate="400 Gb/sec"),),
    host_addresses=("10.0.0.7",),
    environment={
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "CUDA_MODULE_LOADING": "EAGER",
        "NCCL_DEBUG": "WARN",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    },
)
TORCH = {
    "version": "2.9.0+cu128",
    "cuda": "12.8",
    "has_gloo": True,
    "has_nccl": True,
    "num_devices": 3,
    "architectures": ["sm_80", "sm_90", "compute_90"],
    "nccl": "2.27.5",
    "device_error": None,
    "capability": [9, 0],
}
MEGATRON = {
    "version": "0.19.2",
    "folder": "/opt/megatron/core",
    "has_helpers": True,
    "has_makefile": False,
    "can_write": True,
}
TE = {"is_installed": True, "version": "2.9", "error": None}
APEX = {"is_installed": True, "is_vendors": True, "fused_error": None}
GPUS = tuple(
    Gpu(name="NVIDIA H100 80GB HBM3", driver="570.1", memory_mib=81559, capability=(9, 0))
    for _ in range(3)
)
GOOD = Facts(
    run=Run(num_nodes=2),
    machine=MACHINE,
    gpus=GPUS,
    gpu_failure=None,
    topology=TOPOLOGY,
    torch=Answer(found=TORCH),
    megatron=Answer(found=MEGATRON),
    transformer_engine=Answer(found=TE),
    apex=Answer(found=APEX),
    code_cache=Answer(found={"folder": "/opt/cache"}),
)
FAILED = Answer(failure="ended by signal SIGSEGV")
TENSOR = Run(num_nodes=2, tensor_parallel=2)


def with_machine(**changes: Any) -> Facts:
    return replace(GOOD, machine=replace(MACHINE, **changes))


def with_variables(run: Run = GOOD.run, gpus: tuple[Gpu, ...] = GPUS, **more: str) -> Facts:
    machine = replace(MACHINE, environment={**MACHINE.environment, **more})
    return replace(GOOD, run=run, gpus=gpus, machine=machine)


def with_answer(name: str, found: Mapping[str, Any], **changes: Any) -> Facts:
    return replace(GOOD, **{name: Answer(found={**found, **changes})})


def row_of(facts: Facts, name: str) -> Row:
    (row,) = [row for row in examine(facts) if row.name == name]
    return row


def test_on_a_good_machine_all_is_well_and_nothing_is_to_do():
    rows = examine(GOOD)
    assert [row for row in rows if row.state is not OK or row.remedy] == []
    assert len({row.name for row in rows}) == len(rows)


def test_a_run_on_cpus_asks_for_nothing_that_a_gpu_needs():
    nothing = Answer(found={"is_installed": False, "is_vendors": False, "fused_error": "none"})
    machine = replace(MACHINE, environment={CONNECTIONS: "8", "CUDA_LAUNCH_BLOCKING": "1"})
    facts = replace(
        GOOD,
        run=Run(on_cpu=True, ranks_per_node=2, tensor_parallel=2),
        machine=replace(machine, programs={}),
        gpus=(),
        topology=None,
        torch=Answer(found={**TORCH, "cuda": None, "nccl": None, "has_nccl": False}),
        transformer_engine=FAILED,
        apex=nothing,
    )
    assert [row for row in examine(facts) if row.state is not OK] == []


MIXED = (*GPUS[:2], replace(GPUS[2], name="NVIDIA A100"))
BLACKWELL = tuple(replace(gpu, capability=(10, 0)) for gpu in GPUS)
HELPER, FUSION = "helper of Megatron's data sets", "gradient accumulation fusion"
CASES: list[tuple[Facts, str, State, str]] = [
    (with_machine(python=(3, 11, 2)), "Python", PROBLEM, "3.11.2.*3.12 or later"),
    (replace(GOOD, torch=FAILED), "torch", PROBLEM, "SIGSEGV .*pip install"),
    (with_answer("torch", TORCH, version="2.5.1"), "torch", PROBLEM, "2.5.1"),
    (with_answer("torch", TORCH, version="2.10.0"), "torch", OK, "2.10.0"),
    (with_answer("torch", TORCH, cuda=None), "torch", PROBLEM, "without CUDA"),
    (replace(GOOD, torch=FAILED), "NCCL and gloo", WARNING, "unknown"),
    (with_answer("torch", TORCH, has_gloo=False), "NCCL and gloo", PROBLEM, "no gloo"),
    (with_answer("torch", TORCH, has_nccl=False), "NCCL and gloo", PROBLEM, "no NCCL"),
    (GOOD, "NCCL and gloo", OK, "NCCL 2.27.5, gloo"),
    (replace(GOOD, megatron=FAILED), "Megatron", PROBLEM, "SIGSEGV"),
    (
        replace(GOOD, megatron=Answer(found={"refused": "core from a but training from b: do c"})),
        "Megatron",
        PROBLEM,
        "core from a but training from b -> do c",
    ),
    (GOOD, "Megatron", OK, "0.19.2"),
    (replace(GOOD, megatron=FAILED), HELPER, WARNING, "unknown"),
    (with_answer("megatron", MEGATRON, has_helpers=False), HELPER, PROBLEM, "nothing to build it"),
    (
        with_answer("megatron", MEGATRON, has_helpers=False, has_makefile=True, can_write=False),
        HELPER,
        PROBLEM,
        "cannot be written to -> .*make -C",
    ),
    (with_answer("megatron", MEGATRON, has_helpers=False, has_makefile=True), HELPER, OK, "make"),
    (
        replace(
            with_answer("megatron", MEGATRON, has_makefile=True),
            machine=replace(MACHINE, programs={"make": "/usr/bin/make"}),
        ),
        HELPER,
        PROBLEM,
        r"g\+\+ not on PATH -> install g\+\+",
    ),
    (replace(GOOD, transformer_engine=FAILED), "Transformer Engine", PROBLEM, "SIGSEGV"),
    (
        with_answer("transformer_engine", {"is_installed": False}),
        "Transformer Engine",
        WARNING,
        "not installed.* -> .*--transformer-impl local",
    ),
    (
        with_answer("transformer_engine", TE, error="OSError: libcudnn.so.9"),
        "Transformer Engine",
        PROBLEM,
        "libcudnn",
    ),
    (GOOD, "Transformer Engine", OK, "2.9"),
    (replace(GOOD, apex=FAILED), "apex", PROBLEM, "SIGSEGV"),
    (with_answer("apex", APEX, is_vendors=False), "apex", WARNING, "not NVIDIA's"),
    (with_answer("apex", APEX, is_installed=False), "apex", OK, "only gradient accumulation"),
    (replace(GOOD, apex=FAILED), FUSION, WARNING, "--no-gradient-accumulation-fusion"),
    (
        with_answer("apex", APEX, fused_error="ModuleNotFoundError"),
        FUSION,
        WARNING,
        "ModuleNotFoundError.* -> give --no-gradient-accumulation-fusion",
    ),
    (GOOD, FUSION, OK, "imported"),
    (with_machine(programs={"gcc": "/usr/bin/gcc"}), "C compiler", OK, "/usr/bin/gcc"),
    (with_machine(programs={}), "C compiler", WARNING, "torch.compile"),
    (replace(GOOD, code_cache=FAILED), "folder for compiled planners", PROBLEM, "numba"),
    (
        with_answer("code_cache", {"folder": None, "reason": "no locator"}),
        "folder for compiled planners",
        WARNING,
        "no locator.* -> set NUMBA_CACHE_DIR",
    ),
    (
        replace(
            with_answer("torch", TORCH, num_devices=0), gpus=(), gpu_failure="nvidia-smi is away"
        ),
        "GPUs",
        PROBLEM,
        "nvidia-smi is away -> .*--cpu",
    ),
    (replace(GOOD, torch=FAILED), "GPUs", WARNING, "torch cannot be asked"),
    (with_answer("torch", TORCH, num_devices=0), "GPUs", PROBLEM, "can use none"),
    (with_answer("torch", TORCH, device_error="ECC error"), "GPUs", PROBLEM, "ECC error"),
    (with_answer("torch", TORCH, capability=[12, 0]), "GPUs", OK, "H100"),
    (
        with_answer("torch", TORCH, capability=[12, 0], architectures=["sm_80", "sm_90"]),
        "GPUs",
        PROBLEM,
        "12.0, but torch was built for sm_80, sm_90",
    ),
    (with_answer("torch", TORCH, capability=[8, 6]), "GPUs", OK, "H100"),
    (with_answer("torch", TORCH, capability=[7, 0]), "GPUs", PROBLEM, "7.0"),
    (replace(GOOD, run=Run(ranks_per_node=8)), "GPUs", PROBLEM, "sees 3 for 8 ranks"),
    (replace(GOOD, gpus=MIXED), "GPUs", WARNING, "different kinds"),
    (GOOD, "GPUs", OK, "3 x NVIDIA H100 80GB HBM3, driver 570.1"),
    (GOOD, CONNECTIONS, OK, "32: a hardware queue for every stream"),
    (with_machine(environment={}), CONNECTIONS, WARNING, "not set: streams share"),
    (with_variables(**{CONNECTIONS: "8"}), CONNECTIONS, WARNING, "8: streams share.*=32"),
    (with_variables(**{CONNECTIONS: "many"}), CONNECTIONS, PROBLEM, "from 1 to 32"),
    (with_variables(**{CONNECTIONS: "33"}), CONNECTIONS, PROBLEM, "from 1 to 32"),
    (with_variables(**{CONNECTIONS: "1"}), CONNECTIONS, WARNING, "1: streams share"),
    (with_variables(TENSOR, **{CONNECTIONS: "1"}), CONNECTIONS, OK, "1"),
    (with_variables(TENSOR), CONNECTIONS, PROBLEM, "asserts 1 .*export"),
    (with_variables(TENSOR, **{CONNECTIONS: "8"}), CONNECTIONS, PROBLEM, "8; Megatron asserts 1"),
    (with_variables(Run(context_parallel=2)), CONNECTIONS, PROBLEM, "asserts 1"),
    (with_variables(TENSOR, BLACKWELL), CONNECTIONS, OK, "32: a"),
    (with_variables(TENSOR, BLACKWELL, **{CONNECTIONS: "1"}), CONNECTIONS, WARNING, "share"),
    (GOOD, "links between GPUs", OK, "NV18 x 3"),
    (replace(GOOD, gpus=GPUS[:1]), "links between GPUs", OK, "none needed"),
    (replace(GOOD, topology=None), "links between GPUs", WARNING, "tells nothing"),
    (replace(GOOD, topology="No devices"), "links between GPUs", WARNING, "no pair"),
    (
        replace(GOOD, topology=TOPOLOGY.replace("NV18\tPIX", "SYS\tPIX")),
        "links between GPUs",
        WARNING,
        "GPUs 0 and 2 by SYS, without NVLink",
    ),
    (GOOD, "network between nodes", OK, "mlx5_0:1 400 Gb/sec"),
    (with_machine(ports=()), "network between nodes", WARNING, "TCP"),
    (
        with_machine(ports=(replace(MACHINE.ports[0], is_active=False),)),
        "network between nodes",
        WARNING,
        "no active InfiniBand port",
    ),
    (
        replace(with_machine(ports=()), run=Run(num_nodes=1)),
        "network between nodes",
        OK,
        "no active InfiniBand port",
    ),
    (with_variables(NCCL_IB_DISABLE="1"), "network between nodes", WARNING, "NCCL_IB_DISABLE"),
    (with_variables(NCCL_IB_DISABLE="0"), "network between nodes", OK, "mlx5"),
    (with_machine(locked_memory_bytes=65536), "network between nodes", WARNING, "ulimit -l"),
    (GOOD, "address of this host", OK, "10.0.0.7"),
    (with_machine(host_addresses=("127.0.1.1", "::1")), "address of this host", PROBLEM, "GLOO"),
    (with_machine(host_addresses=()), "address of this host", PROBLEM, "cannot be resolved"),
    (
        replace(with_machine(host_addresses=("127.0.1.1",)), run=Run(num_nodes=1)),
        "address of this host",
        OK,
        "127.0.1.1",
    ),
    (with_variables(GLOO_SOCKET_IFNAME="ib0"), "address of this host", OK, "ib0"),
    (GOOD, "cores for planners", OK, "109 left, e.g. --dip-planner-cores 3"),
    (with_machine(cores=(4, 5, 6)), "cores for planners", WARNING, "none left"),
    (with_machine(cores=(4,)), "cores for planners", WARNING, "--cpu-bind=none"),
    (with_machine(quota_cores=3.5), "cores for planners", WARNING, "time of 3.5"),
    (GOOD, "NUMA nodes", OK, "node 1: 56 cores"),
    (with_machine(numa_nodes={}), "NUMA nodes", OK, "tells none"),
    (with_machine(cores=tuple(range(50))), "NUMA nodes", WARNING, "none of node 1"),
    (GOOD, "memory of the host", OK, "1000 GiB"),
    (with_machine(memory_limit_bytes=64 * GIB), "memory of the host", OK, "limit of the container"),
    (with_machine(memory_limit_bytes=9 * GIB), "memory of the host", WARNING, "take about 10"),
    (with_machine(memory_bytes=8 * GIB), "memory of the host", WARNING, "--mem"),
    (with_machine(shared_memory_bytes=None), "/dev/shm", PROBLEM, "cannot be written to"),
    (with_machine(shared_memory_bytes=64 * 2**20), "/dev/shm", WARNING, "--shm-size"),
    (with_machine(open_files=1024), "open files", WARNING, "1,024.* ulimit -n 65536"),
    (GOOD, "environment", OK, "MAX_CONNECTIONS=32, CUDA_MODULE_LOADING=EAGER, NCCL_DEBUG=WARN"),
    (with_machine(environment={}), "environment", OK, "nothing set"),
    (with_variables(CUDA_LAUNCH_BLOCKING="1"), "CUDA_LAUNCH_BLOCKING", PROBLEM, "unset"),
    (with_variables(TORCH_NCCL_BLOCKING_WAIT="true"), "TORCH_NCCL_BLOCKING_WAIT", WARNING, "host"),
    (
        with_variables(TORCH_NCCL_ASYNC_ERROR_HANDLING="0"),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        WARNING,
        "for ever",
    ),
    (
        with_variables(TORCH_DISTRIBUTED_DEBUG="detail"),
        "TORCH_DISTRIBUTED_DEBUG",
        WARNING,
        "checked",
    ),
    (with_variables(NCCL_P2P_DISABLE="1"), "NCCL_P2P_DISABLE", WARNING, "NVLink"),
    (with_variables(NCCL_SHM_DISABLE="1"), "NCCL_SHM_DISABLE", WARNING, "network"),
    (with_machine(environment={}), "CUDA_MODULE_LOADING", WARNING, "LAZY.*=EAGER"),
    (with_variables(CUDA_MODULE_LOADING="lazy"), "CUDA_MODULE_LOADING", WARNING, "lazy.*=EAGER"),
    (GOOD, "CUDA_MODULE_LOADING", OK, "EAGER"),
    (with_machine(environment={}), "allocator of GPU memory", WARNING, "expandable_segments:True"),
    (
        with_machine(environment={"PYTORCH_ALLOC_CONF": "expandable_segments: true"}),
        "allocator of GPU memory",
        OK,
        "true",
    ),
    (with_variables(OMP_NUM_THREADS="32"), "OMP_NUM_THREADS", OK, "32"),
    (with_variables(OMP_NUM_THREADS="64"), "OMP_NUM_THREADS", WARNING, "want 192 of 112"),
    (with_variables(OMP_NUM_THREADS="x"), "OMP_NUM_THREADS", WARNING, "not a number"),
]


@pytest.mark.parametrize(("facts", "name", "state", "text"), CASES)
def test_a_row_says_what_was_found_and_what_to_do(facts, name, state, text):
    row = row_of(facts, name)
    assert row.state is state, row
    assert re.search(text, f"{row.found} -> {row.remedy}", re.DOTALL), row
    assert bool(row.remedy) == (state is not OK)


@pytest.mark.parametrize("name", ["CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE"])
def test_a_variable_that_is_off_does_no_harm(name):
    assert worst_state(examine(with_variables(**{name: "0"}))) is OK


# ---- other programs ---------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A function that puts a program with the given shell text on PATH, before all others."""

    def make(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return make


def test_gpus_are_those_of_the_drivers_tool(program):
    program(
        "nvidia-smi",
        'case "$*" in topo*) echo "GPU0 X" ;; '
        '*compute_cap*) echo "NVIDIA H100, 570.1, 81559, 9.0" ;; esac',
    )
    gpu = Gpu(name="NVIDIA H100", driver="570.1", memory_mib=81559, capability=(9, 0))
    assert ask_gpus(30) == ((gpu,), None)
    assert ask_topology(30) == "GPU0 X\n"


def test_a_tool_that_knows_no_capability_is_asked_without(program):
    program(
        "nvidia-smi",
        '[[ "$*" == *compute_cap* ]] && { echo "bad field" >&2; exit 2; }; echo "A100, 470.1, 1"',
    )
    gpu = Gpu(name="A100", driver="470.1", memory_mib=1, capability=None)
    assert ask_gpus(30) == ((gpu,), None)


def test_a_tool_that_fails_says_why(program, monkeypatch):
    program("nvidia-smi", 'echo "could not talk to the driver" >&2; exit 9')
    assert ask_gpus(30) == (
        (),
        "nvidia-smi ended with status 9: could not talk to the driver",
    )
    assert ask_topology(30) is None
    program("nvidia-smi", "true")
    assert ask_gpus(30) == ((), "nvidia-smi shows no GPU")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert ask_gpus(30) == ((), "nvidia-smi is not on PATH")


def is_running(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_hangs_is_ended_with_its_children(program, tmp_path):
    program("hang", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    assert ask_program(["hang"], 5) == ("", "no answer within 5 s")
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    # A process that is told to end does so when it comes to a core.
    end = time.monotonic() + 60
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_program_that_crashes_or_is_missing_is_told(program):
    program("crash", "kill -SEGV $$")
    assert ask_program(["crash"], 30) == ("", "ended by signal SIGSEGV")
    _, failure = ask_program(["/nonexistent/program"], 30)
    assert failure is not None and "cannot be started" in failure


# ---- probes -----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package whose import runs the given text."""

    def make(name: str, text: str) -> None:
        folder = tmp_path / "packages"
        for part in [*Path(name.replace(".", "/")).parents][:-1]:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "__init__.py").touch()
        (folder / f"{name.replace('.', '/')}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")

    return make


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("print('hello')", Answer(found={"is_installed": True, "version": None, "error": None})),
        ("import os; os.abort()", Answer(failure="ended by signal SIGABRT")),
        (
            "raise OSError('libcudnn.so.9 is missing')",
            Answer(
                found={
                    "is_installed": True,
                    "version": None,
                    "error": "OSError: libcudnn.so.9 is missing",
                }
            ),
        ),
    ],
    ids=["works", "crashes", "raises"],
)
def test_a_broken_package_ends_only_its_probe(package, text, expected):
    package("transformer_engine.pytorch", text)
    assert ask_python("transformer_engine", 60) == expected


def test_a_package_that_hangs_on_import_has_a_time_limit(package):
    package("transformer_engine.pytorch", "import time; time.sleep(600)")
    assert ask_python("transformer_engine", 3) == Answer(failure="no answer within 3 s")


def test_another_programs_apex_is_told_from_nvidias(package):
    package("apex.pyramid", "")
    answer = ask_python("apex", 60)
    assert answer.found["is_installed"] and not answer.found["is_vendors"]
    package("apex.normalization.fused", "")
    package("fused_weight_gradient_mlp_cuda", "")
    answer = ask_python("apex", 60)
    assert answer.found["is_vendors"] and answer.found["fused_error"] is None


def test_an_answer_that_is_none_is_a_failure(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # As for a run, what lies in the current folder comes first.
    package("megatron_dip.doctor.probes", "print('megatron-dip probe: [1]')")
    assert ask_python("apex", 60) == Answer(failure="its answer is [1]")
    package("megatron_dip.doctor.probes", "print('megatron-dip probe: {')")
    assert "not JSON" in str(ask_python("apex", 60).failure)
    package("megatron_dip.doctor.probes", "")
    assert ask_python("apex", 60) == Answer(failure="it ended without an answer")


def test_facts_of_this_machine_are_gathered_and_judged():
    facts = gather(Run(on_cpu=True), 250)
    answers = (facts.torch, facts.megatron, facts.transformer_engine, facts.apex, facts.code_cache)
    assert [answer.failure for answer in answers] == [None] * len(answers)
    assert facts.torch.found["version"].startswith(importlib.metadata.version("torch"))
    assert set(TORCH) - {"capability"} <= set(facts.torch.found)
    assert set(facts.megatron.found) == set(MEGATRON)
    assert Path(facts.code_cache.found["folder"]).is_dir()
    assert {row.name for row in examine(GOOD)} - {row.name for row in examine(facts)} == {
        "CUDA_MODULE_LOADING",
        "allocator of GPU memory",
    }


# ---- the system -------------------------------------------------------------------------------


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_lists_of_cores_are_the_kernels():
    assert parse_cores("0-2,8,10-11\n") == (0, 1, 2, 8, 10, 11)
    assert parse_cores("") == ()


def test_limits_ports_and_nodes_are_read_from_the_system(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/memory.max": f"{48 * GIB}\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/step/cpu.max": "250000 100000\n",
            "sys/devices/system/node/node0/cpulist": "0-1\n",
            "sys/devices/system/node/node1/cpulist": "2-3\n",
            "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            "dev/shm/file": "",
        },
    )
    machine = describe_machine(root)
    assert machine.memory_limit_bytes == 48 * GIB
    assert machine.quota_cores == 2.5
    assert machine.numa_nodes == {0: (0, 1), 1: (2, 3)}
    assert machine.ports == (
        Port(device="mlx5_0:1", is_active=True, rate="400 Gb/sec (4X NDR)"),
        Port(device="mlx5_1:1", is_active=False, rate="unknown rate"),
    )
    assert machine.shared_memory_bytes
    assert machine.python == sys.version_info[:3]


def test_limits_of_the_older_control_groups_are_read_too(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    machine = describe_machine(root)
    assert (machine.memory_limit_bytes, machine.quota_cores) == (GIB, 1.5)


def test_a_system_that_tells_nothing_has_no_limits(tmp_path):
    machine = describe_machine(tmp_path)
    assert machine.memory_limit_bytes is None and machine.quota_cores is None
    assert machine.numa_nodes == {} and machine.ports == ()
    assert machine.shared_memory_bytes is None


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def examined(monkeypatch):
    """What the command asked for, on a machine that the test makes."""
    asked: list[tuple[Run, float]] = []

    def use(facts: Facts) -> list[tuple[Run, float]]:
        def gather(run: Run, limit_seconds: float) -> Facts:
            asked.append((run, limit_seconds))
            return replace(facts, run=run)

        monkeypatch.setattr(command, "gather", gather)
        return asked

    return use


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_only_a_problem_makes_the_exit_status_1(examined):
    examined(GOOD)
    assert run().exit_code == 0
    examined(with_machine(open_files=10))
    result = run()
    assert result.exit_code == 0 and "-> ulimit -n 65536" in result.output
    assert result.output.splitlines()[-1].endswith("1 warning, 0 problem")
    examined(with_machine(shared_memory_bytes=None))
    assert run().exit_code == 1


def test_json_holds_all_rows(examined):
    examined(with_machine(shared_memory_bytes=None))
    result = run("--json")
    assert result.exit_code == 1
    data = json.loads(result.output)
    assert data["state"] == "problem"
    assert [row["name"] for row in data["rows"]] == [row.name for row in examine(GOOD)]
    assert {"name", "state", "found", "remedy"} == set(data["rows"][0])


def test_a_terminal_gets_a_table(examined, monkeypatch):
    examined(with_machine(open_files=10))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    output = run().output
    assert "\u2502" in output and "[green]" not in output and "ulimit -n 65536" in output


def test_a_cluster_says_what_the_run_is(examined):
    asked = examined(GOOD)
    run("--cluster", str(ROOT / "configs" / "clusters" / "h100_16.yaml"))
    run("--cpu", "--ranks", "2", "--limit-seconds", "9")
    run("--tensor-parallel", "2", "--context-parallel", "4", "--nodes", "3")
    assert asked == [
        (Run(num_nodes=2, ranks_per_node=8, tensor_parallel=4), 120.0),
        (Run(on_cpu=True, ranks_per_node=2), 9.0),
        (Run(num_nodes=3, tensor_parallel=2, context_parallel=4), 120.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit-seconds", "0"), "--limit-seconds 0.0: expected 1 to 600"),
        (("--ranks", "0"), "--ranks 0: expected 1 to 1,024"),
        (("--nodes", "2", "--cluster", "x.yaml"), "--nodes beside --cluster"),
        (("--cluster", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_options_that_cannot_be_used_are_refused(examined, arguments, message):
    examined(GOOD)
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output
