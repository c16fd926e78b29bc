"""Megatron's own schedule with communication beneath computing, where a tower may have no work.

Megatron counts on a gradient of every parameter in the last microbatch.  Microbatches of one
sequence are often of text alone.
"""

import shlex
from pathlib import Path

import pytest
from equality_runs import largest_difference
from launching import REPOSITORY
from tiny_lavin import make_tiny_scienceqa, write_lavin_config
from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

EXAMPLES = REPOSITORY / "examples"
OVERLAP = "--overlap-grad-reduce"
GATHER = f"{OVERLAP} --use-distributed-optimizer --overlap-param-gather --ddp-bucket-size 5000"


def run(
    folder: Path, name: str, arguments: str, *, num_ranks: int, script: str = "pretrain_vlm"
) -> TrainingRun:
    text = (
        f"--dip-config {folder / 'config.yaml'} --pipeline-model-parallel-size 1 "
        f"--micro-batch-size 1 --global-batch-size 4 --train-iters 5 --seed 3 {arguments}"
    )
    command = shlex.split(text)
    return train(folder / name, num_ranks, *command, script=EXAMPLES / f"{script}.py")


def assert_equal(ours: TrainingRun, theirs: TrainingRun) -> None:
    assert largest_difference(ours.losses, theirs.losses) <= 1e-6
    assert largest_difference(ours.grad_norms, theirs.grad_norms) <= 1e-5


@pytest.mark.parametrize("overlap", [OVERLAP, GATHER], ids=["reduce", "reduce and gather"])
def test_replicas_of_which_one_has_no_image_reduce_alike(tmp_path: Path, overlap: str) -> None:
    """In buckets of a few parameters, so that their order tells."""
    make_tiny_data(tmp_path / "data")
    write_config(tmp_path / "config.yaml", tmp_path / "data", num_ranks=1)
    optimizer = "--optimizer adam --lr 0.002 --min-lr 0.002 --calculate-per-token-loss"
    plain = run(tmp_path, "plain", optimizer, num_ranks=2)
    assert_equal(run(tmp_path, "overlapped", f"{optimizer} {overlap}", num_ranks=2), plain)


@pytest.mark.parametrize("gates", ["token", "public_code"])
def test_adapters_of_images_and_the_neck_take_part_where_there_is_text_alone(
    tmp_path: Path, gates: str
) -> None:
    make_tiny_scienceqa(tmp_path / "data")
    adapter = {"gates": gates}
    write_lavin_config(tmp_path / "config.yaml", tmp_path / "data", num_ranks=1, adapter=adapter)
    optimizer = "--optimizer sgd --lr 0.1 --min-lr 0.1 --init-method-std 0.1"
    plain, overlapped = (
        run(tmp_path, name, f"{optimizer} {more}", num_ranks=1, script="finetune_lavin")
        for name, more in (("plain", ""), ("overlapped", OVERLAP))
    )
    assert_equal(overlapped, plain)
    assert overlapped.gradients == plain.gradients
