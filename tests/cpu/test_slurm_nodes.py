"""The batch files train and profile on two nodes: stand-ins for SLURM start a torchrun for each.

Both nodes are this machine, and compute on CPUs; ``tests/unit/test_scripts.py`` holds what the
files say to SLURM.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, free_port
from tiny_vlm import make_tiny_data, write_config

from megatron_dip.report.local_run import launched

FAKE_SRUN = """#!/usr/bin/env bash
nodes=1 output=/dev/stdout
while [[ "$1" == --* ]]; do
    case "$1" in --nodes=*) nodes="${1#*=}" ;; --output=*) output="${1#*=}" ;; esac
    shift
done
children=()
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID="$node" "$@" >>"${output//%n/$node}" 2>&1 &
    children+=($!)
done
rc=0
for child in "${children[@]}"; do wait "$child" || rc=$?; done
exit "$rc"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in "show hostnames") printf 'localhost\\nlocalhost\\n' ;; esac
"""
ARGUMENTS = (
    *("--pipeline-model-parallel-size", "2", "--micro-batch-size", "1"),
    *("--global-batch-size", "8", "--lr", "1e-3", "--log-interval", "1", "--num-workers", "0"),
)
LIMIT_SECONDS = 250.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("slurm")
    (made / "bin").mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (made / "bin" / name).write_text(text)
        (made / "bin" / name).chmod(0o755)
    make_tiny_data(made / "data")
    write_config(
        made / "config.yaml",
        made / "data",
        num_ranks=2,
        evaluations=2,
        sub_microbatch_tokens=(24, None),
    )
    return made


def submit(folder: Path, file: str, name: str, *arguments: str, **variables: str) -> Path:
    """Run a batch file as a job; its folder under ``runs``."""
    # The port of the rendezvous follows from the number of the job.
    job = next(port - 10_000 for port in iter(free_port, None) if port < 30_000)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": name,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "DIP_ROOT": str(REPOSITORY),
        "DIP_VENV": sys.prefix,
        "DIP_RUNS": str(folder / "runs"),
        "DIP_CPU": "yes",
        "DIP_GPUS_PER_NODE": "1",
        **variables,
    }
    script = str(REPOSITORY / "scripts" / "slurm" / file)
    command = ["bash", script, str(folder / "config.yaml"), *ARGUMENTS, *arguments]
    with launched(command, environment, limit_seconds=LIMIT_SECONDS) as job_process:
        output = "".join(job_process.lines())
        status = job_process.wait()
    run = folder / "runs" / f"{name}-{job}"
    logs = "".join(path.read_text() for path in (run / "logs").glob("*.log"))
    assert status == 0, f"{output}\n{logs[-6000:]}"
    assert "2 nodes x 1 ranks" in output
    return run


def test_two_nodes_train_and_save(folder: Path) -> None:
    run = submit(folder, "train.sbatch", "train", "--train-iters", "2")
    logs = [path.read_text() for path in sorted((run / "logs").glob("node-*.log"))]
    assert len(logs) == 2
    assert sum("iteration        2/       2" in log for log in logs) == 1
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_two_nodes_measure_layers_for_the_planner(folder: Path) -> None:
    run = submit(folder, "profile.sbatch", "profile", DIP_STEPS="4")
    profile = json.loads((run / "profile.json").read_text())
    assert set(profile["modules"]) == {"vision", "language"}
