"""Training whose samples are moved between replicas and microbatches: nothing else changes."""

import shlex
from pathlib import Path
from statistics import mean

import pytest
import yaml
from equality_runs import largest_difference
from launching import REPOSITORY
from run_twice import RUN_TWICE
from tiny_vlm import make_tiny_data, write_config
from training_runs import SCRIPT, TrainingRun, train

from megatron_dip.report import read_records

NUM_ITERATIONS, FIRST_SAVE, SECOND_SAVE = 6, 2, 4
TOLERANCE = 1e-6
ARGUMENTS = (
    f"--micro-batch-size 1 --global-batch-size 8 --train-iters {NUM_ITERATIONS} "
    f"--lr-decay-iters {NUM_ITERATIONS} --optimizer sgd --lr 0.03 --min-lr 0.03 "
    f"--calculate-per-token-loss --exit-on-missing-checkpoint"
)
PLANS = "--pipeline-model-parallel-size 2 --dip-schedule"
TWICE = f"""
import sys
sys.path.append({str(REPOSITORY / "examples")!r})
import pretrain_vlm as example
{RUN_TWICE}
if __name__ == "__main__":
    example.main(example.forward_step)
"""


class Runs:
    """Uneven batches in single precision; two replicas but for ``fewer``, two pipeline ranks each
    but for ``megatron``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_tiny_data(folder / "data")
        twice = folder / "twice.py"
        twice.write_text(TWICE)
        first, second = folder / "first", folder / "second"
        self.given = self._train("given", 4, "none", PLANS)
        self.moved = self._train(
            "moved", 4, "samples", f"{PLANS} --save {first} --save-interval {FIRST_SAVE}"
        )
        self.fewer = self._train(
            "fewer",
            2,
            "samples",
            f"{PLANS} --load {first} --ckpt-step {FIRST_SAVE} --save {second} "
            f"--save-interval {SECOND_SAVE} --exit-interval {SECOND_SAVE}",
        )
        self.more = self._train("more", 4, "samples", f"{PLANS} --load {second}", twice)
        self.megatron = self._train("megatron", 2, "samples", "", twice)

    def trace(self, name: str) -> Path:
        return self._folder / f"{name}-trace"

    def _train(
        self, name: str, num_ranks: int, moves: str, more: str, script: Path = SCRIPT
    ) -> TrainingRun:
        num_pipeline_ranks = 2 if PLANS in more else 1
        path = write_config(
            self._folder / f"{name}.yaml",
            self._folder / "data",
            num_ranks=num_pipeline_ranks,
            feedback=False,
        )
        config = yaml.safe_load(path.read_text())
        config["schedule"]["assignment"] = moves
        path.write_text(yaml.safe_dump(config))
        text = f"--dip-config {path} {ARGUMENTS} {more}"
        if PLANS in more:
            text += f" --dip-trace-dir {self.trace(name)}"
        return train(self._folder / name, num_ranks, *shlex.split(text), script=script)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("assignment"))


@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("moved", slice(None)),
        # One replica goes on from what two have saved, and two from what it has saved.
        ("fewer", slice(FIRST_SAVE, SECOND_SAVE)),
        ("more", slice(SECOND_SAVE, None)),
        ("megatron", slice(None)),
    ],
)
def test_losses_and_gradient_norms_are_those_without_it(
    runs: Runs, name: str, iterations: slice
) -> None:
    """Also of a resumed run, with another number of replicas, under Megatron's own schedule, and
    where steps are run twice."""
    run: TrainingRun = getattr(runs, name)
    loss = largest_difference(run.losses, runs.given.losses[iterations])
    norm = largest_difference(run.grad_norms, runs.given.grad_norms[iterations])
    print(f"{name}: largest differences of losses {loss:.1e}, of norms {norm:.1e}")
    assert loss <= TOLERANCE and norm <= TOLERANCE


def test_steps_were_run_twice(runs: Runs) -> None:
    for run in (runs.more, runs.megatron):
        assert "Need to rerun step" in run.owner_log


def test_the_log_and_the_records_say_what_was_moved(runs: Runs) -> None:
    said = "schedule.assignment samples, first batch: "
    assert runs.moved.owner_log.count(said) == runs.megatron.owner_log.count(said) == 1
    assert "schedule.assignment" not in runs.given.owner_log
    assert all(record.assignment is None for record in read_records(runs.trace("given")))
    records = read_records(runs.trace("moved"))
    moved = [record.assignment for record in records if record.assignment is not None]
    assert len(moved) == len(records) and any(one.num_moved for one in moved)
    assert all(one.replicas[1] <= one.replicas[0] for one in moved)
    # Few of these samples share a sequence: some batches have no better assignment.
    assert mean(one.replicas[1] for one in moved) < 1.05 < mean(one.replicas[0] for one in moved)
    resumed = [record.assignment for record in read_records(runs.trace("more"))]
    assert resumed == moved[SECOND_SAVE:]
