"""Stages of Transformer Engine's modules, without a GPU: see ``stand_in_te``."""

from pathlib import Path

import pytest
from forked_ranks import fork_ranks
from gpt_runs import GPT_ARGUMENTS, losses_of

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
    """The last rank; ``folder`` must be new."""
    command = [str(script), *arguments]
    ranks = fork_ranks(folder, num_ranks, command, timeout_seconds=280, packages=STAND_IN)
    for rank, completed in enumerate(ranks):
        assert completed.returncode == 0, f"rank {rank}:\n{completed.output[-4000:]}"
    return ranks[-1]


@pytest.mark.parametrize(
    ("num_ranks", "recipes"), [(1, ("none", "mxfp8")), (2, ("delayed",))], ids=["alone", "sharded"]
)
def test_stages_of_transformer_engine_compute_what_local_ones_do(num_ranks, recipes, tmp_path):
    output = run_with_stand_in(tmp_path / "run", num_ranks, WORKER, *recipes).output
    assert output.count("as local layers") == len(recipes)


def train_gpt(folder, *arguments):
    """Losses and gradient norms, and how many weight gradients the last rank put off."""
    command = [*GPT_ARGUMENTS, "--train-iters", "3", *PIPELINE, *arguments]
    completed = run_with_stand_in(folder, 2, GPT_SCRIPT, *command)
    losses = losses_of(completed)
    assert len(losses) == 3
    return losses, int(completed.output.rpartition("put off: ")[2].split()[0])


def test_weight_gradients_that_are_put_off_are_counted_once(tmp_path):
    """With layers that add to their gradients themselves, and where they hand them out."""
    config = tmp_path / "split.yaml"
    config.write_text("schedule: {split_backward: true}")
    expected, num_put_off = train_gpt(tmp_path / "stock")
    assert not num_put_off
    plans = ("--dip-schedule", "--dip-config", str(config))
    found, num_put_off = train_gpt(tmp_path / "fused", *plans, FUSED)
    assert found == expected and num_put_off
    overlapping = ("--overlap-grad-reduce", "--use-distributed-optimizer", *RECOMPUTING)
    found, num_put_off = train_gpt(tmp_path / "overlapping", *plans, *overlapping)
    assert found == expected and num_put_off
