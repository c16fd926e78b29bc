"""``megatron-dip launch-cmd``: what it prints, and sizes that do not fit."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dip.cli.launch_line import GPU_ENVIRONMENT
from megatron_dip.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ("--cluster", "configs/clusters/h100_16.yaml")
SCRIPT = "examples/pretrain_vlm.py"
MEET = ("--rendezvous", "node01:29500")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(*arguments: str, after: tuple[str, ...] = (SCRIPT,)):
    return CliRunner().invoke(app, ["launch-cmd", *arguments, "--", *after])


def words(*arguments: str, after: tuple[str, ...] = (SCRIPT,)) -> list[str]:
    """As a shell splits what is printed."""
    result = run(*arguments, after=after)
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout.replace("\\\n", " "))


def test_a_cluster_of_two_nodes_gets_one_line_for_both():
    found = words(*CLUSTER, "--config", "configs/vlm_s.yaml", *MEET, after=(SCRIPT, "--seed", "7"))
    assert found == [
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
        *(f"{name}={value}" for name, value in GPU_ENVIRONMENT.items()),
        *("torchrun", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node01:29500"),
        *("--nproc-per-node=8", "-m", "megatron_dip.launch", SCRIPT),
        *("--dip-schedule", "--dip-config", "configs/vlm_s.yaml"),
        *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"),
        *("--sequence-parallel", "--bf16", "--no-gradient-accumulation-fusion"),
        *("--micro-batch-size", "1", "--train-iters", "100", "--lr", "1e-4"),
        *("--global-batch-size", "16", "--seed", "7"),
    ]


def test_for_slurm_the_line_names_nodes_gpus_script_and_configuration():
    found = words(*CLUSTER, "--config", "configs/vlm_s.yaml", "--slurm", "--apex")
    assert found[:6] == [
        *("sbatch", "--nodes=2", "--gpus-per-node=8", f"--export=ALL,DIP_SCRIPT={SCRIPT}"),
        *("scripts/slurm/train.sbatch", "configs/vlm_s.yaml"),
    ]
    assert found[6:8] == ["--tensor-model-parallel-size", "4"]
    assert "--dip-schedule" not in found and "--no-gradient-accumulation-fusion" not in found


def test_one_node_needs_no_meeting_place_and_options_win_over_the_file():
    found = words(*CLUSTER, "--gpus", "8", "--tensor-parallel", "1", "--pipeline-parallel", "2")
    assert "--standalone" in found and "--nproc-per-node=8" in found
    assert found[0] == "CUDA_DEVICE_MAX_CONNECTIONS=32"
    assert "--sequence-parallel" not in found and "--use-distributed-optimizer" in found
    assert found[found.index("--global-batch-size") + 1] == "64"


@pytest.mark.parametrize(("tensor", "context", "expected"), [(2, 1, 1), (1, 2, 1), (1, 1, 32)])
def test_one_hardware_queue_is_asked_for_where_megatron_asserts_it(tensor, context, expected):
    sizes = ("--tensor-parallel", str(tensor), "--context-parallel", str(context))
    found = words("--gpus", "8", "--pipeline-parallel", "2", *sizes)
    assert found[0] == f"CUDA_DEVICE_MAX_CONNECTIONS={expected}"


def test_on_cpus_ranks_are_pinned_and_flags_of_gpus_are_left_out():
    found = words("--gpus", "2", "--pipeline-parallel", "2", "--cpu")
    start = found.index("-m")
    assert found[start : start + 5] == ["-m", "megatron_dip.launch", "--cpu", "--pin", SCRIPT]
    assert found[0] == "OMP_NUM_THREADS=1" and "--bf16" not in found


def test_what_is_given_is_not_said_twice_and_comes_last():
    after = (SCRIPT, "--fp16", "--train-samples=640", "--micro-batch-size", "2")
    found = words(*CLUSTER, *MEET, "--context-parallel", "2", "--gpus", "32", after=after)
    assert found[-len(after) + 1 :] == list(after[1:])
    for absent in ("--bf16", "--train-iters"):
        assert absent not in found
    assert found.count("--micro-batch-size") == 1
    assert found[found.index("--context-parallel-size") + 1] == "2"
    assert found[found.index("--global-batch-size") + 1] == "32"


def test_values_are_quoted_for_the_shell():
    after = (SCRIPT, "--data-path", "my data;x")
    assert "'my data;x'" in run("--gpus", "1", "--pipeline-parallel", "1", after=after).stdout


def test_notes_do_not_mix_with_the_command():
    result = run(*CLUSTER, *MEET, "--gpus-per-node", "2")
    assert "layers would talk over the network" in result.stderr
    assert "start the same command on each of the 8 nodes" in result.stderr
    assert "#" not in result.stdout


TINY = "configs/vlm_tiny.yaml"
S = "configs/vlm_s.yaml"


@pytest.mark.parametrize(
    ("arguments", "after", "message"),
    [
        ((), (SCRIPT,), "--cluster FILE, or --gpus and --pipeline-parallel"),
        (CLUSTER, (), "-- SCRIPT"),
        (CLUSTER, ("gone.py",), "there is no script 'gone.py'"),
        ((*CLUSTER, "--gpus", "12"), (SCRIPT,), "num_gpus 12 is not a multiple .* change one"),
        ((*CLUSTER, "--gpus-per-node", "3"), (SCRIPT,), r"gpus_per_node 3: .*--gpus 15"),
        (CLUSTER, (SCRIPT,), "--rendezvous None: give HOST:PORT"),
        ((*CLUSTER, "--rendezvous", "node"), (SCRIPT,), "--rendezvous 'node': give HOST:PORT"),
        ((*CLUSTER, "--rendezvous", ":29500"), (SCRIPT,), "--rendezvous ':29500': give HOST:PORT"),
        (
            (*CLUSTER, "--slurm", "--config", S, "--rendezvous", "node01:29500"),
            (SCRIPT,),
            "--rendezvous 'node01:29500': nodes of --slurm find each other: leave it out",
        ),
        (
            ("--gpus", "8", "--pipeline-parallel", "4", "--rendezvous", "node01:29500"),
            (SCRIPT,),
            "--rendezvous 'node01:29500': one node needs none: leave it out",
        ),
        (
            ("--cpu", "--gpus", "2", "--pipeline-parallel", "2", "--apex"),
            (SCRIPT,),
            "--apex with --cpu: .*leave one of them out",
        ),
        ((*CLUSTER, "--slurm"), (SCRIPT,), "needs --config FILE"),
        ((*CLUSTER, "--cpu"), (SCRIPT,), "started on one machine .*--gpus-per-node 16"),
        ((*CLUSTER, "--config", TINY), (SCRIPT,), "num_ranks is 2.*--pipeline-parallel 2"),
        (
            (*CLUSTER, "--config", S, "--tensor-parallel", "16", "--gpus", "64"),
            (SCRIPT,),
            r"16 does not divide model.language.num_query_groups 8 .*-parallel 8",
        ),
        (
            CLUSTER,
            (SCRIPT, "--pipeline-model-parallel-size", "2"),
            "size 2 after --, but the cluster and its options say 4",
        ),
        (CLUSTER, (SCRIPT, "--dip-config", S), "give it as --config"),
        (
            (*CLUSTER, "--gpus", "64"),
            (SCRIPT, "--global-batch-size", "10"),
            r"10 is not a multiple of 4, .* x 4 replicas \(give 8\)",
        ),
        (CLUSTER, (SCRIPT, "--micro-batch-size=x"), "--micro-batch-size 'x': expected a whole"),
        ((*CLUSTER, "--expert-parallel", "2"), (SCRIPT,), "expert_parallel 2 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(arguments, after, message):
    result = run(*arguments, after=after)
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output


def test_the_scripts_for_slurm_set_the_same_variables():
    text = (ROOT / "scripts" / "slurm" / "common.sh").read_text(encoding="utf-8")
    exported = dict(re.findall(r'^export (\w+)="\$\{\1:-([^}]*)\}"', text, re.M))
    assert exported == GPU_ENVIRONMENT
