"""Megatron's arguments about data, evaluation, resuming and signals mean what they mean there."""

import argparse
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from equality_runs import largest_difference
from failing_runs import error_of, run_vlm
from launching import REPOSITORY, CompletedRank
from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

from megatron_dip.families import loaders
from megatron_dip.families.configs import load_config
from megatron_dip.families.data.index import build_index, split_source
from megatron_dip.families.data.packing import PackingOptions
from megatron_dip.families.data.sources import DataSettings, open_source
from megatron_dip.families.iterators import set_lengths
from megatron_dip.families.vlm.dataset import VlmDataset
from megatron_dip.integration import saving

SIZES = "--micro-batch-size 1 --global-batch-size 4 --lr 0.001 --min-lr 0.001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    make_tiny_data(folder / "data")
    write_config(folder / "config.yaml", folder / "data", num_ranks=2)
    return folder


def run(folder: Path, name: str, arguments: str) -> TrainingRun:
    """Two pipeline ranks."""
    text = f"--pipeline-model-parallel-size 2 --dip-config {folder / 'config.yaml'} {SIZES} "
    return train(folder / name, 2, *shlex.split(f"{text} {arguments}"))


def end_of(folder: Path, name: str, arguments: str, **options: Any) -> list[CompletedRank]:
    """As ``run``, for runs that end in another way."""
    config = str(folder / "config.yaml")
    text = f"--pipeline-model-parallel-size 2 --global-batch-size 4 {arguments}"
    return run_vlm(folder / name, 2, "--dip-config", config, *shlex.split(text), **options)


def iterations(rank: CompletedRank) -> list[tuple[int, int]]:
    """As logged: the number, and the samples consumed until then."""
    found = re.findall(r"iteration +(\d+)/.*?consumed samples: +(\d+)", rank.output)
    return [(int(number), int(samples)) for number, samples in found]


# ---- evaluation -----------------------------------------------------------------------------


def test_evaluation_and_skipped_batches_are_those_of_megatron_under_both_schedules(
    folder: Path,
) -> None:
    """Sizes of microbatches say how samples are grouped, never which are evaluated."""
    common = (
        "--train-iters 4 --eval-iters 2 --eval-interval 2 --start-eval-at-iter 4 "
        "--iterations-to-skip 2 --calculate-per-token-loss"
    )
    stock = run(folder, "stock", common)
    large = run(folder, "stock-large", f"{common} --eval-micro-batch-size 4")
    ours = run(folder, "dip", f"{common} --eval-micro-batch-size 2 --dip-schedule")
    assert len(stock.losses) == 3 and len(stock.validation_losses) == 2
    for other in (large, ours):
        assert largest_difference(other.losses, stock.losses) <= 1e-5
        assert largest_difference(other.validation_losses, stock.validation_losses) <= 1e-5


def test_full_validation_is_the_evaluation_of_every_sample_once(folder: Path) -> None:
    count = num_valid_sequences(folder)
    one_by_one = f"--skip-train --eval-global-batch-size 1 --eval-iters {count}"
    every = run(folder, "every", f"{one_by_one} --dip-schedule")
    full = run(folder, "full", "--skip-train --full-validation --dip-schedule")
    assert len(full.validation_losses) == 1 and count > 5
    assert largest_difference(full.validation_losses, every.validation_losses) <= 1e-6
    trained = run(folder, "full-stock", "--train-iters 2 --eval-interval 1 --full-validation")
    assert len(trained.validation_losses) == 3
    assert trained.validation_losses[1] == trained.validation_losses[2] < full.validation_losses[0]


def num_valid_sequences(folder: Path) -> int:
    config = load_config(str(folder / "config.yaml"))
    data: Any = config.data
    settings = DataSettings(
        samples=data.path,
        image_folder=data.image_folder,
        tokenizer=data.tokenizer,
        seq_length=96,
        patch_size=4,
        min_image_tokens=data.min_image_tokens,
        max_image_tokens=data.max_image_tokens,
    )
    index, _ = build_index(settings, folder, show_progress=False)
    _, valid = split_source(open_source(settings), data.valid_share, 1234)
    packing = PackingOptions(separation=data.separation)
    return len(
        VlmDataset(settings, index, num_samples=None, seed=1234, subset=valid, packing=packing)
    )


# ---- resuming -------------------------------------------------------------------------------


def test_a_run_goes_on_with_other_evaluation_and_a_finished_one_ends_well(folder: Path) -> None:
    saved = f"--save {folder / 'saved'} --save-interval 3 --dip-schedule"
    loaded = f"{saved} --load {folder / 'saved'}"
    first = end_of(folder, "first", f"--train-iters 2 --eval-iters 2 --eval-interval 1 {saved}")
    again = end_of(folder, "again", f"--train-iters 2 --eval-iters 1 {loaded}")
    less = end_of(
        folder,
        "less",
        f"--train-iters 3 --eval-iters 1 --eval-interval 9 --override-opt-param-scheduler {loaded}",
    )
    for ranks in (first, again, less):
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    assert iterations(first[-1]) == [(1, 4), (2, 8)]
    assert iterations(less[-1]) == [(3, 12)]
    said = [line for line in again[0].output.splitlines() if "nothing is left to train" in line]
    assert len(said) == 1 and "iteration 2 of 2" in said[0]
    assert iterations(again[-1]) == [] and "validation loss at iteration 2" in again[-1].output
    assert "successfully saved" in first[0].output
    assert "successfully saved" not in again[0].output, "over the good one"


# ---- signals --------------------------------------------------------------------------------

_SIGNALLED = """
import os, subprocess, sys
sys.path.append("EXAMPLES")
import pretrain_vlm as example
from megatron.training import get_args

def forward_step(data_iterator, model):
    if get_args().curr_iteration == 1 and not sent:
        # By another process: a worker of a loader answers its parent in another way.
        code = f"import os, signal; os.killpg({os.getpgid(0)}, signal.SIGTERM)"
        command = [sys.executable, "-c", code]
        sent.append(subprocess.run(command, start_new_session=True, check=True))
    return example.forward_step(data_iterator, model)

if __name__ == "__main__":
    sent = []
    example.main(forward_step)
"""


def test_a_signal_to_all_processes_ends_a_run_with_a_checkpoint_that_goes_on(
    folder: Path,
) -> None:
    """The group of a rank: its loaders' workers, its planners, and what collects checkpoints."""
    script = folder / "signalled.py"
    script.write_text(_SIGNALLED.replace("EXAMPLES", str(REPOSITORY / "examples")))
    common = (
        f"--train-iters 40 --save {folder / 'kept'} --save-interval 1 --num-workers 2 "
        f"--eval-iters 1 --eval-interval 1 --exit-signal-handler --dip-schedule"
    )
    ended = end_of(folder, "signalled", common, script=script)
    for rank in ended:
        assert rank.returncode == 0, rank.output[-3000:]
        assert "another one takes its place" not in rank.output, "a planner was ended"
    assert iterations(ended[-1]) == [(1, 4), (2, 8)]
    assert "exiting program after receiving SIGTERM" in ended[0].output
    resumed = end_of(folder, "resumed", f"{common} --load {folder / 'kept'} --exit-interval 4")
    assert [rank.returncode for rank in resumed] == [0, 0], resumed[0].output[-3000:]
    assert iterations(resumed[-1]) == [(3, 12), (4, 16)]


# ---- small data sets ------------------------------------------------------------------------


def test_one_sample_can_be_trained_on_but_not_evaluated_as_well(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data", num_samples=1)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", num_ranks=1)
    (rank,) = run_vlm(tmp_path / "run", 1, "--dip-config", str(config), "--dip-schedule")
    assert rank.returncode == 0 and iterations(rank) == [(1, 2), (2, 4)], rank.output[-3000:]
    flags = ("--dip-config", str(config), "--dip-schedule", "--eval-iters", "1")
    (refused,) = run_vlm(tmp_path / "refused", 1, *flags)
    assert "of 1 samples for validation" in error_of(refused)


# ---- without a run --------------------------------------------------------------------------


def arguments(**values: Any) -> argparse.Namespace:
    stated = {
        "dataloader_type": "single",
        "train_iters": 10,
        "iteration": 0,
        "global_batch_size": 4,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "step_batch_size_schedule": None,
        "eval_iters": 3,
        "eval_interval": 5,
        "eval_global_batch_size": 8,
        "full_validation": False,
        "skip_train": False,
    }
    return argparse.Namespace(**(stated | values))


@pytest.mark.parametrize(
    ("values", "train_length", "valid_length"),
    [
        ({}, 40, 3 * 3 * 8),
        ({"eval_iters": 0}, 40, 0),
        # Six iterations of eight; the batch and the number of evaluations were larger before.
        ({"iteration": 6, "consumed_train_samples": 48}, 64, 2 * 3 * 8),
        ({"iteration": 6, "consumed_valid_samples": 500}, 16, 500 + 2 * 3 * 8),
        ({"iteration": 10, "consumed_train_samples": 40}, 44, 3 * 8),
        ({"skip_train": True, "train_iters": 0}, 0, 3 * 8),
        ({"full_validation": True, "eval_iters": 0}, 40, None),
        ({"dataloader_type": "cyclic"}, None, None),
        ({"dataloader_type": "cyclic", "eval_iters": 0, "skip_train": True}, 0, 0),
    ],
)
def test_sets_are_as_long_as_what_the_run_still_reads(
    values: dict[str, Any], train_length: int | None, valid_length: int | None
) -> None:
    lengths = set_lengths(arguments(**values))
    assert (lengths.train, lengths.valid) == (train_length, valid_length)


def test_growing_batches_have_no_end_of_the_data() -> None:
    lengths = set_lengths(arguments(step_batch_size_schedule="0:4,100:8"))
    assert lengths.train is not None and lengths.train > 10**9


@pytest.mark.parametrize(
    ("iteration", "save", "is_saved"), [(2, "a", False), (3, "a", True), (2, "b", True)]
)
def test_a_checkpoint_that_was_loaded_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, iteration: int, save: str, is_saved: bool
) -> None:
    args = SimpleNamespace(load="x/../a", save=save, iteration=2)
    monkeypatch.setattr(saving, "get_args", lambda: args)
    written: list[int] = []
    saving._once(lambda number, *_: written.append(number))(iteration, "model")
    assert bool(written) == is_saved


def test_other_data_sets_go_megatrons_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in (
        "build_pretraining_data_loader",
        "cyclic_iter",
        "dummy_train_step",
        "evaluate_and_print_results",
    ):
        monkeypatch.setattr(loaders.training, name, lambda *given: calls.append(given) or "own")
    loaders.install_loaders()
    training = loaders.training
    assert training.build_pretraining_data_loader([1], 7) == "own"
    assert training.cyclic_iter([2]) == "own"
    training.dummy_train_step([3])
    assert calls == [([1], 7), ([2],), ([3],)]
