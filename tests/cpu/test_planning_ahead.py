"""Plans made while training goes on: what becomes of them, of the run and of the processes."""

import json
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from failing_runs import error_of, run_vlm
from launching import REPOSITORY
from planner_processes import Killer, Watcher, wait_until_ended
from run_twice import RUN_TWICE
from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

NUM_ITERATIONS = 12
PATIENT = {"wait_limit_ms": 600_000.0, "search_limit_ms": 600_000.0}
_SIZES = "--micro-batch-size 2 --global-batch-size 8 --lr 0.002 --min-lr 0.002"
_SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.append("EXAMPLES")
import pretrain_vlm as example
from megatron.training import get_args
from megatron_dip.families.vlm.batches import VlmMicrobatch

CHANGES

if __name__ == "__main__":
    example.main(example.forward_step)
"""

# Has training wait in every forward step until ``holds(service)``, on the plan owner.  A wait polls
# the service as training does.
_WAITING = """
from megatron_dip.runtime import PlanService
forward_step, make_service = example.forward_step, PlanService.__init__
services = []

def remember(service, **options):
    make_service(service, **options)
    services.append(service)

def waiting(data_iterator, model):
    deadline = time.monotonic() + 240
    while services and not holds(services[0]):
        assert time.monotonic() < deadline, "nothing happened"
        services[0]._poll()
        time.sleep(0.02)
    return forward_step(data_iterator, model)

PlanService.__init__ = remember
example.forward_step = waiting
"""
_UNTIL_ALL_IS_PLANNED = """
def holds(service):
    return all(job.is_over for job in service._jobs.values())
"""


@dataclass(frozen=True)
class Traced:
    """A run and what its ranks have written, by line."""

    run: TrainingRun
    ranks: list[list[dict[str, Any]]]

    def planning(self, name: str) -> list[Any]:
        """Per training iteration, what the plan owner of the first pipeline says of its plan."""
        return [line["planning"][name] for line in self.ranks[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    make_tiny_data(folder / "data", num_samples=120)
    return folder


def write_script(folder: Path, changes: str) -> Path:
    examples = str(REPOSITORY / "examples")
    path = folder / "script.py"
    path.write_text(_SCRIPT.replace("CHANGES", changes).replace("EXAMPLES", examples))
    return path


def run(
    folder: Path,
    name: str,
    *arguments: str,
    num_ranks: int = 2,
    planning: dict[str, float] | None = None,
    evaluations: int = 64,
    script: Path | None = None,
) -> Traced:
    config = write_config(
        folder / f"{name}.yaml",
        folder / "data",
        num_ranks=2,
        sub_microbatch_tokens=(90, 96),
        evaluations=evaluations,
        planning=planning or PATIENT,
        feedback=False,
    )
    trace = folder / name / "trace"
    flags = [
        *shlex.split(_SIZES),
        *("--train-iters", str(NUM_ITERATIONS), "--pipeline-model-parallel-size", "2"),
        *("--dip-config", str(config), "--dip-schedule", "--dip-trace-dir", str(trace)),
        *(arguments or ("--eval-iters", "0")),
    ]
    options = {} if script is None else {"script": script}
    done = train(folder / name, num_ranks, *flags, **options)
    files = sorted(trace.glob("rank*.jsonl"))
    return Traced(done, [[json.loads(line) for line in f.read_text().splitlines()] for f in files])


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """No step ends before the plan of the next one is made, however long that takes."""
    script = write_script(tmp_path_factory.mktemp("script"), _UNTIL_ALL_IS_PLANNED + _WAITING)
    return run(folder, "undisturbed", script=script)


def actions_of(line: dict[str, Any]) -> list[str]:
    labels = [label for label, *_ in line["spans"]]
    return [label for label in labels if label not in ("data", "plan", "look ahead")]


def test_training_waits_for_no_plan_that_is_made_in_time(undisturbed: Traced) -> None:
    """After the first one, which has no step to hide behind."""
    assert undisturbed.planning("origin") == ["searched"] * NUM_ITERATIONS
    first, *others = undisturbed.planning("waited_ms")
    assert first > 0.0 and others == [0.0] * (NUM_ITERATIONS - 1)
    assert all(milliseconds > 0.0 for milliseconds in undisturbed.planning("planning_ms"))


def test_planner_processes_that_are_killed_change_no_loss_and_lose_no_step(
    tmp_path: Path, folder: Path, undisturbed: Traced
) -> None:
    """Training waits for the killer, so that a fast machine sees as many deaths as a slow one."""
    tally = tmp_path / "killed"
    tally.touch()
    until_enough_are_killed = f"""
def holds(service):
    return Path({str(tally)!r}).stat().st_size >= get_args().curr_iteration // 2
"""
    script = write_script(tmp_path, until_enough_are_killed + _WAITING)
    with Watcher() as watcher, Killer(mean_seconds=0.2, limit=100, tally=tally) as killer:
        disturbed = run(folder, "killed", planning=PATIENT | {"workers": 2}, script=script)
    assert killer.num_killed >= (NUM_ITERATIONS - 1) // 2
    assert disturbed.run.losses == undisturbed.run.losses
    assert disturbed.run.grad_norms == undisturbed.run.grad_norms
    assert len(disturbed.run.losses) == NUM_ITERATIONS
    assert "planner process" in disturbed.run.owner_log
    wait_until_ended(watcher.seen)


def test_a_planner_with_too_much_to_do_delays_no_step_beyond_the_limit(
    folder: Path, undisturbed: Traced
) -> None:
    """A search takes minutes: a run that waited for each of them would not end in time."""
    planning = {"wait_limit_ms": 20.0, "search_limit_ms": 600_000.0}
    busy = run(folder, "busy", planning=planning, evaluations=10**7)
    # Which of them depends on how far the planner is when a step ends.
    assert set(busy.planning("origin")) <= {"cut short", "fallback"}
    assert re.search("is trained with (a plan without a search|the best plan)", busy.run.owner_log)
    differences = zip(busy.run.losses, undisturbed.run.losses, strict=True)
    assert max(abs(ours - theirs) / theirs for ours, theirs in differences) < 1e-4


def test_a_step_that_is_run_again_has_the_same_plan_and_the_same_data(
    folder: Path, undisturbed: Traced
) -> None:
    script = write_script(folder, RUN_TWICE)
    twice = run(folder, "twice", script=script)
    assert twice.run.losses == undisturbed.run.losses
    assert twice.run.grad_norms == undisturbed.run.grad_norms
    for lines, once in zip(twice.ranks, undisturbed.ranks, strict=True):
        # Megatron lets the first one pass.
        numbers = [1, *(number for number in range(2, NUM_ITERATIONS + 1) for _ in range(2))]
        assert [line["iteration"] for line in lines] == numbers
        expected = [actions_of(once[number - 1]) for number in numbers]
        assert [actions_of(line) for line in lines] == expected


def test_replicas_plan_ahead_each_for_itself_and_through_evaluations(folder: Path) -> None:
    """Two pipelines; losses are the same when they start in the middle, with nothing held."""
    flags = "--eval-iters 2 --eval-interval 3"
    saves = f"--save {folder / 'saved'} --save-interval {NUM_ITERATIONS // 2}"
    whole = run(folder, "whole", *shlex.split(f"{flags} {saves}"), num_ranks=4)
    loads = f"--load {folder / 'saved'} --ckpt-step {NUM_ITERATIONS // 2}"
    again = run(folder, "again", *shlex.split(f"{flags} {loads}"), num_ranks=4)
    middle = NUM_ITERATIONS // 2
    assert again.run.losses == whole.run.losses[middle:]
    assert again.run.grad_norms == whole.run.grad_norms[middle:]
    count = len(again.run.validation_losses)
    assert count > 0 and again.run.validation_losses == whole.run.validation_losses[-count:]
    owners = [lines for lines in whole.ranks if "planning" in lines[0]]
    assert len(owners) == 2
    assert all(line["planning"]["origin"] == "searched" for lines in owners for line in lines)
    assert any(actions_of(one) != actions_of(other) for one, other in zip(*owners, strict=True)), (
        "the replicas had the same plans"
    )


def test_metadata_that_is_not_that_of_the_data_ends_the_run_and_is_named(
    tmp_path: Path, folder: Path
) -> None:
    changes = """
from dataclasses import replace

metadata = VlmMicrobatch.metadata

def lying(self):
    truth = metadata(self)
    lies = [replace(item, tokens=item.tokens + 4) for item in truth["language"]]
    return truth | {"language": lies}

VlmMicrobatch.metadata = lying
"""
    config = write_config(folder / "lying.yaml", folder / "data", num_ranks=2)
    flags = ("--pipeline-model-parallel-size", "2", "--dip-config", str(config), "--dip-schedule")
    script = write_script(tmp_path, changes)
    liar, other = run_vlm(tmp_path / "run", 2, *flags, script=script)
    error = error_of(liar)
    assert "the metadata of microbatch" in error and "is not that of its data" in error
    assert "the other process has ended" in error_of(other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_rank_that_ends_while_planning_leaves_no_process_behind(
    tmp_path: Path, folder: Path, number: signal.Signals
) -> None:
    found = tmp_path / "planners"
    changes = f"""
from planner_processes import planner_processes
forward_step = example.forward_step

def ending(data_iterator, model):
    if get_args().curr_iteration == 1 and os.environ["RANK"] == "0":
        deadline = time.monotonic() + 240
        while not (planners := planner_processes(os.getpid())):
            assert time.monotonic() < deadline, "there are no planner processes"
            time.sleep(0.02)
        Path({str(found)!r}).write_text(" ".join(map(str, planners)))
        os.kill(os.getpid(), {int(number)})
    return forward_step(data_iterator, model)

example.forward_step = ending
"""
    planning = {"wait_limit_ms": 0.0, "search_limit_ms": 60_000.0}
    config = write_config(
        folder / "ending.yaml",
        folder / "data",
        num_ranks=2,
        evaluations=10**7,
        planning=planning,
    )
    flags = ("--pipeline-model-parallel-size", "2", "--dip-config", str(config), "--dip-schedule")
    ended, survivor = run_vlm(tmp_path / "run", 2, *flags, script=write_script(tmp_path, changes))
    assert ended.returncode == -number
    assert "the other process has ended" in error_of(survivor)
    planners = [int(pid) for pid in found.read_text().split()]
    assert planners
    wait_until_ended(planners)
