"""Text-to-video models train alike under plans and under Megatron's own schedule.

Initial weights, noise and timesteps do not depend on the layout, so that all runs start alike.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
from equality_runs import ADAM, MEAN, PER_TOKEN, largest_difference
from launching import REPOSITORY
from tiny_t2v import make_tiny_clips, write_t2v_config
from training_runs import TrainingRun, train

from megatron_dip.plan import ActionType, Plan, load_plan

SCRIPT = REPOSITORY / "examples" / "pretrain_t2v.py"
NUM_ITERATIONS = 10
SGD = "--optimizer sgd --lr 0.3 --min-lr 0.3"
SGD_TOLERANCE, ADAM_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4, 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; without ``num_segments`` it has Megatron's own schedule."""

    arguments: str
    num_processes: int = 2
    num_ranks: int = 2
    own_arguments: str = ""
    num_segments: int | None = None
    part_tokens: int | None = None
    planner: str = "dual_queue"
    train_text: bool = False


class Runs:
    """Makes runs in ``folder`` as they are asked for, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Case, str] = {}
        make_tiny_clips(folder / "data")
        self.of = cache(self._make)

    def plans(self, case: Case) -> list[Plan]:
        """What a run under ``--dip-schedule`` followed, replica after replica."""
        self.of(case)
        return [
            load_plan(path) for path in sorted(self._path(case).glob("trace/plan-replica*.json"))
        ]

    def _path(self, case: Case) -> Path:
        return self._folder / self._names.setdefault(case, f"run{len(self._names)}")

    def _make(self, case: Case) -> TrainingRun:
        folder = self._path(case)
        config = write_t2v_config(
            folder.with_suffix(".yaml"),
            self._folder / "data",
            num_ranks=case.num_ranks,
            num_segments=case.num_segments or 1,
            sub_microbatch_tokens=case.part_tokens,
            train_text=case.train_text,
            planner=case.planner,
        )
        schedule = ""
        if case.num_segments:
            schedule = f"--dip-schedule --dip-trace-dir {folder / 'trace'}"
        text = (
            f"--train-iters {NUM_ITERATIONS} --eval-iters 1 --micro-batch-size 2 "
            f"--global-batch-size 8 --pipeline-model-parallel-size {case.num_ranks} "
            f"--dip-config {config} {case.arguments} {case.own_arguments} {schedule}"
        )
        return train(folder, case.num_processes, *shlex.split(text), script=SCRIPT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("t2v"))


def compare(runs: Runs, case: Case, stock: Case, tolerance: float) -> None:
    ours, theirs = runs.of(case), runs.of(stock)
    assert len(theirs.losses) == NUM_ITERATIONS
    loss = largest_difference(ours.losses, theirs.losses)
    norm = largest_difference(ours.grad_norms, theirs.grad_norms)
    validation = largest_difference(ours.validation_losses, theirs.validation_losses)
    print(f"{case}: loss {loss:.1e}, norm {norm:.1e}, validation {validation:.1e}")
    assert loss <= tolerance, (ours.losses, theirs.losses)
    assert norm <= NORM_TOLERANCE, (ours.grad_norms, theirs.grad_norms)
    assert validation <= tolerance


STOCK_SGD = Case(arguments=f"{SGD} {MEAN}")
SPLIT = replace(STOCK_SGD, num_segments=2, part_tokens=60)
REPLICAS = replace(SPLIT, num_processes=4, own_arguments="--overlap-grad-reduce")
STOCK_ADAM = Case(arguments=f"{ADAM} {PER_TOKEN}")
SHARDED = replace(
    STOCK_ADAM,
    num_processes=4,
    own_arguments="--tensor-model-parallel-size 2 --sequence-parallel",
    num_segments=1,
    part_tokens=60,
)
STOCK_TRAINED_TEXT = replace(STOCK_ADAM, train_text=True)
TRAINED_TEXT = replace(STOCK_TRAINED_TEXT, num_segments=2, planner="one_f_one_b")


def test_the_loss_falls(runs: Runs) -> None:
    losses = runs.of(STOCK_SGD).losses
    assert mean(losses[-3:]) < 0.9 * mean(losses[:3])


def test_plans_train_as_the_stock_schedule_with_parts_of_microbatches(runs: Runs) -> None:
    compare(runs, SPLIT, STOCK_SGD, SGD_TOLERANCE)
    parts = {sub.sub for plan in runs.plans(SPLIT) for sub in plan.sub_microbatches}
    assert parts == {0, 1}
    tokens = {
        items["dit"][0].tokens for plan in runs.plans(SPLIT) for items in plan.problem.microbatches
    }
    assert len(tokens) >= 5, "clips of many sizes"


def test_noise_and_loss_do_not_depend_on_the_number_of_replicas(runs: Runs) -> None:
    compare(runs, REPLICAS, STOCK_SGD, SGD_TOLERANCE)


def test_plans_under_tensor_and_sequence_parallelism_train_as_the_stock_schedule(
    runs: Runs,
) -> None:
    compare(runs, SHARDED, STOCK_ADAM, ADAM_TOLERANCE)


def test_a_trained_text_encoder_trains_as_under_the_stock_schedule(runs: Runs) -> None:
    compare(runs, TRAINED_TEXT, STOCK_TRAINED_TEXT, ADAM_TOLERANCE)
    # Else the comparison would say nothing of the encoder's gradients.
    frozen, trained = runs.of(STOCK_ADAM).losses, runs.of(STOCK_TRAINED_TEXT).losses
    assert largest_difference(trained[1:], frozen[1:]) > ADAM_TOLERANCE


@pytest.mark.parametrize(("case", "trains"), [(SPLIT, False), (TRAINED_TEXT, True)])
def test_only_a_trained_text_encoder_has_a_backward_in_the_plan(
    runs: Runs, case: Case, trains: bool
) -> None:
    for plan in runs.plans(case):
        text = {stage.stage for stage in plan.partition.stages if stage.module == "text"}
        types = {
            action.type for actions in plan.actions for action in actions if action.stage in text
        }
        forward = {ActionType.FORWARD, ActionType.SEND_FORWARD, ActionType.RECV_FORWARD}
        assert forward <= types | {ActionType.SEND_FORWARD, ActionType.RECV_FORWARD}
        assert bool(types - forward) == trains, types
