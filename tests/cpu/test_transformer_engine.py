"""Stages of Transformer Engine's modules, without a GPU: see ``stand_in_te``."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from forked_ranks import fork_ranks
from gpt_runs import GPT_ARGUMENTS, losses_of
from short_of_memory import assert_moved, write_short, write_steady

STAND_IN = Path(__file__).with_name("stand_in_te")
WORKER = Path(__file__).with_name("te_stages_worker.py")
GPT_SCRIPT = Path(__file__).with_name("te_gpt_script.py")
FUSED = "--fused-accumulation"
PIPELINE = ("--pipeline-model-parallel-size", "2")
RECOMPUTING = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)


def run_with_stand_in(folder, num_ranks, script, *arguments):
    """All ranks; ``folder`` must be new."""
    command = [str(script), *arguments]
    ranks = fork_ranks(folder, num_ranks, command, timeout_seconds=280, packages=STAND_IN)
    for rank, completed in enumerate(ranks):
        assert completed.returncode == 0, f"rank {rank}:\n{completed.output[-4000:]}"
    return ranks


@pytest.mark.parametrize(
    ("num_ranks", "recipes"), [(1, ("none", "mxfp8")), (2, ("delayed",))], ids=["alone", "sharded"]
)
def test_stages_of_transformer_engine_compute_what_local_ones_do(num_ranks, recipes, tmp_path):
    output = run_with_stand_in(tmp_path / "run", num_ranks, WORKER, *recipes)[-1].output
    assert output.count("as local layers") == len(recipes)


class TrainedGpt(NamedTuple):
    losses: dict[int, tuple[float, float]]
    """With gradient norms."""
    num_put_off: int
    """Weight gradients, on the last rank."""
    moved_bytes: int
    """To the host, by all ranks."""


def train_gpt(folder, *arguments):
    command = [*GPT_ARGUMENTS, "--train-iters", "3", *PIPELINE, *arguments]
    ranks = run_with_stand_in(folder, 2, GPT_SCRIPT, *command)
    counted = [re.search(r"bytes moved: (\d+) .* put off: (\d+)", rank.output) for rank in ranks]
    losses = losses_of(ranks[-1])
    assert len(losses) == 3
    return TrainedGpt(losses, int(counted[-1][2]), sum(int(count[1]) for count in counted))


def test_weight_gradients_that_are_put_off_are_counted_once(tmp_path):
    """With layers that add to their gradients themselves, and where they hand them out."""
    config = tmp_path / "split.yaml"
    config.write_text("schedule: {split_backward: true}")
    stock = train_gpt(tmp_path / "stock")
    assert not stock.num_put_off
    plans = ("--dip-schedule", "--dip-config", str(config))
    found = train_gpt(tmp_path / "fused", *plans, FUSED)
    assert found.losses == stock.losses and found.num_put_off
    overlapping = ("--overlap-grad-reduce", "--use-distributed-optimizer", *RECOMPUTING)
    found = train_gpt(tmp_path / "overlapping", *plans, *overlapping)
    assert found.losses == stock.losses and found.num_put_off


@pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])
def test_what_its_layers_keep_goes_to_the_host_and_comes_back(splits, tmp_path):
    """With weight gradients in the backward, or put off, when what they are made of is back."""
    config = write_steady(tmp_path / "room.yaml", {"schedule": {"split_backward": splits}})
    found = {}
    for name in ("room", "short"):
        if name == "short":
            write_short(tmp_path / "short.yaml", config, tmp_path / "traces-room")
        plans = ("--dip-schedule", "--dip-config", str(tmp_path / f"{name}.yaml"), FUSED)
        traces = ("--dip-trace-dir", str(tmp_path / f"traces-{name}"))
        found[name] = train_gpt(tmp_path / name, *plans, *traces)
    assert_moved(tmp_path / "traces-short", tmp_path / "traces-room")
    assert found["short"].losses == found["room"].losses
    assert bool(found["short"].num_put_off) == splits
    assert found["short"].moved_bytes and not found["room"].moved_bytes
