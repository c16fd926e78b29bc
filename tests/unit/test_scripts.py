"""The shell scripts: clean under shellcheck, and what each of them runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "scripts" / "slurm"
SBATCH = SLURM / "train.sbatch"
PROFILE = SLURM / "profile.sbatch"
COMMON = SLURM / "common.sh"
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), SBATCH, PROFILE, ROOT / ".ci" / "run"])

# Each writes down how it was called. Training takes TRAINING_MIN minutes on the cluster's clock,
# which is a file, and on ours as long as there is a file "hold".
FAKE_SRUN = """#!/usr/bin/env bash
[[ -e "$RECORD/first_srun" ]] || printf '%s\\n' "$@" > "$RECORD/first_srun"
printf '%s\\n' "$@" > "$RECORD/srun"
printf '%s\\n' "$CUDA_DEVICE_MAX_CONNECTIONS" > "$RECORD/connections"
echo $(($(cat "$RECORD/now") + 60 * ${TRAINING_MIN:-1})) > "$RECORD/now"
while [[ -e "$RECORD/hold" ]]; do sleep 0.05; done
exit "${SRUN_STATUS:-0}"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'node07\\nnode08\\nnode11\\n' ;;
    "show job") printf '   StartTime=Unknown EndTime=%s Deadline=N/A\\n' "${JOB_END:-Unknown}" ;;
    *) printf '%s\\n' "$*" >> "$RECORD/scontrol" ;;
esac
"""
FAKE_DATE = f"""#!/usr/bin/env bash
if [[ "$*" == +%s ]]; then cat "$RECORD/now"; else exec {shutil.which("date")} "$@"; fi
"""
START_S = 1_800_000_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path):
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install -e '.[dev]'"
    done = subprocess.run(
        [shellcheck, "--external-sources", str(script)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.parent != SLURM], ids=str)
def test_a_script_that_is_called_can_be_executed(script: Path):
    assert os.access(script, os.X_OK)


class Cluster:
    """A repository, a fake srun and a fake scontrol, and what a job's environment holds."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repository"
        self.record = folder / "record"
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "vlm",
            "SLURM_JOB_NODELIST": "node[07-08,11]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(self.root),
            "SLURM_JOB_END_TIME": str(START_S + 100 * 60),
        }
        for path in ("bin", "record", "a repository/examples", "a repository/configs"):
            (folder / path).mkdir(parents=True)
        (self.root / "scripts").mkdir()
        (self.root / "scripts" / "slurm").symlink_to(SLURM)
        (self.root / "examples" / "pretrain_vlm.py").touch()
        (self.root / "configs" / "vlm_m.yaml").touch()
        (self.root / ".venv" / "bin").mkdir(parents=True)
        (self.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
        (self.record / "now").write_text(str(START_S))
        fakes = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "date": FAKE_DATE}
        for name, text in fakes.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(
        self, *arguments: str, file: Path = SBATCH, **environment: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(file), *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: str, file: Path = SBATCH, **environment: str) -> tuple[int, str]:
        job = self.start(*arguments, file=file, **environment)
        output, _ = job.communicate(timeout=60)
        return job.returncode, output

    def recorded(self, command: str) -> list[str]:
        path = self.record / command
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_the_job_starts_one_torchrun_per_node_with_the_plan_schedule(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", "--train-iters", "50")
    assert status == 0, output
    root = cluster.root
    run = root / "runs" / "vlm-4711"
    arguments = cluster.recorded("srun")
    command = arguments[arguments.index(str(root / ".venv" / "bin" / "python")) :]
    assert command == [
        *(str(root / ".venv" / "bin" / "python"), "-m", "torch.distributed.run"),
        *("--nnodes=3", "--nproc-per-node=4", "--max-restarts=0", "--rdzv-id=4711"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=node07:14711"),
        *("-m", "megatron_dip.launch", "--dip-verbose"),
        str(root / "examples" / "pretrain_vlm.py"),
        *("--dip-schedule", "--dip-config", str(root / "configs" / "vlm_m.yaml")),
        *("--save", str(run / "checkpoints"), "--load", str(run / "checkpoints")),
        *("--save-interval", "500", "--tensorboard-dir", str(run / "tensorboard")),
        *("--exit-duration-in-mins", "85", "--train-iters", "50"),
    ]
    for option in ("--kill-on-bad-exit=1", "--cpu-bind=none", "--nodes=3", "--ntasks-per-node=1"):
        assert option in arguments
    assert cluster.recorded("connections") == ["32"]
    assert (run / "checkpoints").is_dir() and (run / "logs").is_dir()
    assert cluster.recorded("scontrol") == []


def test_the_arguments_of_torchrun_are_ones_that_it_knows(cluster: Cluster):
    run = pytest.importorskip("torch.distributed.run")
    assert cluster.submit("configs/vlm_m.yaml", "--train-iters", "50")[0] == 0
    arguments = cluster.recorded("srun")
    parsed = run.parse_args(arguments[arguments.index("torch.distributed.run") + 1 :])
    assert parsed.module and parsed.training_script == "megatron_dip.launch"
    assert parsed.training_script_args[-2:] == ["--train-iters", "50"]


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["--tensor-model-parallel-size", "4"], {}, "1"),
        (["--tensor-model-parallel-size=4"], {}, "1"),
        (["--context-parallel-size", "2"], {}, "1"),
        (["--tensor-model-parallel-size", "1", "--context-parallel-size=1"], {}, "32"),
        (["--tensor-model-parallel-size", "4"], {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8"),
    ],
)
def test_one_hardware_queue_is_asked_for_only_where_megatron_asserts_it(
    cluster: Cluster, arguments: list[str], given: dict[str, str], expected: str
):
    assert cluster.submit("configs/vlm_m.yaml", *arguments, **given)[0] == 0
    assert cluster.recorded("connections") == [expected]


def test_profiling_runs_a_few_steps_and_makes_a_profile_of_their_timelines(cluster: Cluster):
    more = ("--train-iters", "1000", "--lr", "1e-4")
    status, output = cluster.submit("configs/vlm_m.yaml", *more, file=PROFILE)
    assert status == 0, output
    run = cluster.root / "runs" / "vlm-4711"
    python = str(cluster.root / ".venv" / "bin" / "python")
    # The stand-in keeps its last call.
    assert cluster.recorded("srun") == [
        *("--nodes=1", "--ntasks=1", "--cpu-bind=none", python, "-m", "megatron_dip.cli.main"),
        *("profile", "-o", str(run / "profile.json"), "--from", str(run / "trace")),
    ]
    steps = cluster.recorded("first_srun")
    assert steps[steps.index("--dip-schedule") :] == [
        *("--dip-schedule", "--dip-config", str(cluster.root / "configs" / "vlm_m.yaml")),
        *("--dip-vary-parts", "--dip-trace-dir", str(run / "trace"), "--eval-iters", "0"),
        *("--train-iters", "12", *more, "--exit-interval", "12"),
    ]
    assert (run / "trace").is_dir() and not (run / "checkpoints").exists()


def test_steps_that_failed_make_no_profile(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", file=PROFILE, SRUN_STATUS="3")
    assert status == 2 and "the steps ended with status 3" in output
    assert "profile" not in cluster.recorded("srun")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no configuration was given (expected: sbatch scripts/slurm/profile.sbatch"),
        (["configs/vlm_m.yaml"], {"DIP_STEPS": "3"}, "DIP_STEPS=3 is not a number of steps from 4"),
        (["configs/vlm_m.yaml"], {"DIP_STEPS": "21"}, "DIP_STEPS=21"),
        (["configs/vlm_m.yaml", "--save=x"], {}, "--save: leave it out"),
        (["configs/vlm_m.yaml"], {"DIP_ROOT": "/nonexistent"}, "is not the repository"),
    ],
)
def test_bad_input_for_profiling_ends_the_job_with_one_clear_line(
    cluster: Cluster, arguments: list[str], environment: dict[str, str], message: str
):
    status, output = cluster.submit(*arguments, file=PROFILE, **environment)
    assert status == 2 and message in output, output
    assert cluster.recorded("srun") == []


def test_the_end_of_the_job_is_asked_for_where_slurm_does_not_export_it(cluster: Cluster):
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(START_S + 60 * 60))
    status, output = cluster.submit("configs/vlm_m.yaml", SLURM_JOB_END_TIME="", JOB_END=end)
    assert status == 0, output
    arguments = cluster.recorded("srun")
    assert arguments[arguments.index("--exit-duration-in-mins") + 1] == "45"


def test_a_job_without_a_time_limit_trains_to_its_end(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", SLURM_JOB_END_TIME="")
    assert status == 0, output
    assert "--exit-duration-in-mins" not in cluster.recorded("srun")
    assert cluster.recorded("scontrol") == []


def test_a_container_brings_its_own_python(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", DIP_CONTAINER="registry/vlm:1")
    assert status == 0, output
    arguments = cluster.recorded("srun")
    assert "--container-image=registry/vlm:1" in arguments
    assert arguments[arguments.index("torch.distributed.run") - 2] == "python"


def test_training_that_stopped_for_the_time_limit_is_queued_again(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", TRAINING_MIN="85")
    assert status == 0, output
    assert cluster.recorded("scontrol") == ["requeue 4711"]


def test_training_that_ended_before_the_time_limit_is_not_queued_again(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", TRAINING_MIN="84")
    assert status == 0, output
    assert cluster.recorded("scontrol") == []


def test_requeueing_can_be_switched_off(cluster: Cluster):
    assert cluster.submit("configs/vlm_m.yaml", TRAINING_MIN="85", DIP_REQUEUE="no")[0] == 0
    assert cluster.recorded("scontrol") == []


def test_the_signal_before_the_limit_queues_the_job_again_and_leaves_training_alone(
    cluster: Cluster,
):
    hold = cluster.record / "hold"
    hold.touch()
    job = cluster.start("configs/vlm_m.yaml")
    try:
        wait_until(lambda: bool(cluster.recorded("connections")))
        job.send_signal(signal.SIGUSR1)
        wait_until(lambda: bool(cluster.recorded("scontrol")))
        assert job.poll() is None
    finally:
        hold.unlink()
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert cluster.recorded("scontrol") == ["requeue 4711"]


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"nothing happened within {limit_s} s"
        time.sleep(0.02)


def test_training_that_failed_fails_the_job_and_is_not_queued_again(cluster: Cluster):
    status, output = cluster.submit("configs/vlm_m.yaml", SRUN_STATUS="3")
    assert status == 2
    assert "training ended with status 3" in output
    assert cluster.recorded("scontrol") == []


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no configuration was given"),
        (["configs/none.yaml"], {}, "the configuration configs/none.yaml does not exist"),
        (["configs/vlm_m.yaml"], {"SLURM_JOB_ID": ""}, "submit the file with sbatch"),
        (["configs/vlm_m.yaml"], {"PATH": "/nonexistent"}, "srun is not on PATH"),
        (["configs/vlm_m.yaml"], {"DIP_VENV": "/nonexistent"}, "no Python in /nonexistent"),
        (["configs/vlm_m.yaml"], {"DIP_SCRIPT": "gone.py"}, "pretrain script gone.py does not"),
        (["configs/vlm_m.yaml"], {"DIP_ROOT": "/nonexistent"}, "is not the repository"),
        (["configs/vlm_m.yaml"], {"DIP_GPUS_PER_NODE": "h100:8"}, "is not a number of GPUs"),
    ],
)
def test_bad_input_ends_the_job_with_one_clear_line(
    cluster: Cluster, arguments: list[str], environment: dict[str, str], message: str
):
    if "PATH" in environment:
        cluster.environment["PATH"] = ""
        bash = shutil.which("bash")
        assert bash
        done = subprocess.run(
            [bash, str(SBATCH), *arguments],
            env={**cluster.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        status, output = done.returncode, done.stderr
    else:
        status, output = cluster.submit(*arguments, **environment)
    assert status == 2, output
    assert message in output
    assert cluster.recorded("srun") == []
