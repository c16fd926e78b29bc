"""Training whose samples are moved between replicas and microbatches: nothing else changes."""

import shlex
from pathlib import Path
from statistics import mean

import pytest
import yaml
from equality_runs import largest_difference
from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

from megatron_dip.report import read_records

NUM_ITERATIONS, MIDDLE = 6, 3
TOLERANCE = 1e-6
ARGUMENTS = (
    f"--pipeline-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 8 "
    f"--train-iters {NUM_ITERATIONS} --optimizer sgd --lr 0.03 --min-lr 0.03 "
    f"--calculate-per-token-loss --dip-schedule"
)


class Runs:
    """Two replicas of two pipeline ranks each; uneven batches, in single precision."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_tiny_data(folder / "data")
        saves = f"--save {folder / 'saved'} --save-interval {MIDDLE}"
        loads = f"--load {folder / 'saved'} --ckpt-step {MIDDLE} --exit-on-missing-checkpoint"
        self.given = self._train("given", "none", "")
        self.moved = self._train("moved", "samples", saves)
        self.resumed = self._train("resumed", "samples", loads)

    def trace(self, name: str) -> Path:
        return self._folder / f"{name}-trace"

    def _train(self, name: str, moves: str, more: str) -> TrainingRun:
        path = write_config(
            self._folder / f"{name}.yaml", self._folder / "data", num_ranks=2, feedback=False
        )
        config = yaml.safe_load(path.read_text())
        config["schedule"]["assignment"] = moves
        path.write_text(yaml.safe_dump(config))
        text = f"--dip-config {path} --dip-trace-dir {self.trace(name)} {ARGUMENTS} {more}"
        return train(self._folder / name, 4, *shlex.split(text))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("assignment"))


def test_losses_and_gradient_norms_are_those_without_it_also_in_a_resumed_run(runs: Runs) -> None:
    for name, first in (("moved", 0), ("resumed", MIDDLE)):
        run: TrainingRun = getattr(runs, name)
        loss = largest_difference(run.losses, runs.given.losses[first:])
        norm = largest_difference(run.grad_norms, runs.given.grad_norms[first:])
        print(f"{name}: largest differences of losses {loss:.1e}, of norms {norm:.1e}")
        assert loss <= TOLERANCE and norm <= TOLERANCE


def test_the_log_and_the_records_say_what_was_moved(runs: Runs) -> None:
    assert runs.moved.owner_log.count("schedule.assignment samples, first batch: ") == 1
    assert "schedule.assignment" not in runs.given.owner_log
    assert all(record.assignment is None for record in read_records(runs.trace("given")))
    records = read_records(runs.trace("moved"))
    moved = [record.assignment for record in records if record.assignment is not None]
    assert len(moved) == len(records) and any(one.num_moved for one in moved)
    assert all(one.replicas[1] <= one.replicas[0] for one in moved)
    # Few of these samples share a sequence: some batches have no better assignment.
    assert mean(one.replicas[1] for one in moved) < 1.05 < mean(one.replicas[0] for one in moved)
    resumed = [record.assignment for record in read_records(runs.trace("resumed"))]
    assert resumed == moved[MIDDLE:]
