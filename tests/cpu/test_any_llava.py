"""A user's LLaVA script trains under plans as it does under Megatron's schedule."""

import re
from pathlib import Path

import pytest
from any_model_runs import NUM_ITERATIONS, ScriptRuns, assert_equal

SCRIPT = Path(__file__).with_name("llava_script.py")
ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 12
    --max-position-embeddings 16 --position-embedding-type rope --mock-data
    --tokenizer-type NullTokenizer --vocab-size 64 --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 8 --lr 0.001 --min-lr 0.001
"""
PIPELINE = "--pipeline-model-parallel-size 2"
# Of the tower the second segment is all on the first rank; images and sequences are split.
UNEVEN = {
    "vision": {"layers": [[1, 1], [1, 0]], "sub_microbatch_tokens": 5},
    "language": {"layers": [[0, 2], [1, 1]], "sub_microbatch_tokens": 15},
}
EVEN = {"vision": {"num_segments": 1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ScriptRuns:
    return ScriptRuns(tmp_path_factory.mktemp("llava"), SCRIPT, ARGUMENTS)


def test_tower_and_language_model_in_uneven_segments_compute_the_same(
    runs: ScriptRuns, tmp_path: Path
) -> None:
    saves = f"{PIPELINE} --eval-iters 1 --save-interval {NUM_ITERATIONS - 1} --save {tmp_path}"
    stock = runs.run(2, f"{PIPELINE} --eval-iters 1")
    assert_equal(runs.run(2, saves, UNEVEN), stock)
    # What one cut has saved, another one and Megatron's own placement go on from.
    loads = f"{PIPELINE} --eval-iters 1 --ckpt-step {NUM_ITERATIONS - 1} --load {tmp_path}"
    assert_equal(runs.run(2, loads, EVEN), stock)
    assert_equal(runs.run(2, loads), stock)


def test_sequences_with_many_tiles_and_with_one_are_exchanged_between_microbatches(
    runs: ScriptRuns,
) -> None:
    """Of a loader of the script's own, four microbatches of which two have nearly all tiles."""
    options = f"{PIPELINE} --eval-iters 0 --dataloader-type external --calculate-per-token-loss"
    given = runs.run(2, options, EVEN)
    moved = runs.run(2, options, EVEN, assignment="samples")
    assert_equal(moved, given)
    assert "schedule.assignment" not in given.owner_log
    said = re.findall("schedule.assignment samples, first batch: (.*)", moved.owner_log)
    assert len(said) == 1 and said[0].startswith("4 of 8 moved"), said
