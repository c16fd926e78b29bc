"""A script with a MimoModel of images, sounds and text: Megatron's schedule and plans agree."""

import shlex
from pathlib import Path

import pytest
from forked_ranks import fork_ranks
from gpt_runs import losses_of, validation_loss_of

SCRIPT = Path(__file__).with_name("mimo_script.py")
ARGUMENTS = shlex.split("""
    --num-layers 3 --hidden-size 16 --num-attention-heads 2 --seq-length 16
    --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 63
    --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 0.01 --min-lr 0.01
    --lr-decay-style constant --calculate-per-token-loss --eval-iters 1 --eval-interval 1000
    --log-interval 1 --ckpt-format torch_dist --num-workers 0
""")
# Encoder of sounds whole, language cut unevenly; single images and sequences.
CONFIG = """
schedule:
  modules:
    images: {layers: [[1, 1], [0, 1]], sub_microbatch_tokens: 5}
    sounds: {layers: [[1, 0]]}
    language: {layers: [[1, 0], [1, 1]], sub_microbatch_tokens: 16}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimo")
    (folder / "dip.yaml").write_text(CONFIG)
    return folder


def train(folder, name, num_ranks, *flags):
    command = [str(SCRIPT), *ARGUMENTS, *flags]
    ranks = fork_ranks(folder / name, num_ranks, command, timeout_seconds=200)
    for rank in ranks:
        assert rank.returncode == 0, rank.output[-4000:]
    return ranks[-1]


@pytest.fixture(scope="module")
def stock(folder):
    return train(folder, "stock", 1)


@pytest.fixture(scope="module")
def plans(folder):
    flags = ("--pipeline-model-parallel-size", "2", "--dip-schedule")
    saved = ("--save", str(folder / "saved"), "--save-interval", "2")
    return train(folder, "plans", 2, *flags, "--dip-config", str(folder / "dip.yaml"), *saved)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for iteration, (loss, norm) in expected.items():
        assert found[iteration][0] == pytest.approx(loss, abs=3e-6)
        assert found[iteration][1] == pytest.approx(norm, abs=2e-3)


def test_plans_give_the_losses_and_gradient_norms_of_megatrons_schedule(stock, plans):
    assert set(losses_of(stock)) == {1, 2, 3}
    assert_equal(losses_of(plans), losses_of(stock))
    assert validation_loss_of(plans) == pytest.approx(validation_loss_of(stock), abs=3e-6)


def test_megatrons_schedule_goes_on_from_a_checkpoint_of_stages(folder, stock, plans):
    resumed = train(folder, "resumed", 1, "--load", str(folder / "saved"), "--ckpt-step", "2")
    assert_equal(losses_of(resumed), {3: losses_of(stock)[3]})
