"""A user's GPT script trains under plans as it does under Megatron's schedule."""

from pathlib import Path

import pytest
from any_model_runs import (
    GPT_ARGUMENTS,
    GPT_SCRIPT,
    NUM_ITERATIONS,
    ScriptRuns,
    assert_equal,
)

PIPELINE = "--pipeline-model-parallel-size 2"
# Two segments, a rank without a layer in one of them, and every sequence a part of its own.
UNEVEN = {"language": {"layers": [[2, 0], [1, 1]], "sub_microbatch_tokens": 16}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ScriptRuns:
    untied = f"{GPT_ARGUMENTS} --untie-embeddings-and-output-weights"
    return ScriptRuns(tmp_path_factory.mktemp("gpt"), GPT_SCRIPT, untied)


def test_a_cut_into_uneven_segments_computes_the_same_and_checkpoints_are_exchanged(
    runs: ScriptRuns, tmp_path: Path
) -> None:
    saves = f"{PIPELINE} --eval-iters 1 --save-interval {NUM_ITERATIONS - 1} --save"
    stock = runs.run(2, f"{saves} {tmp_path / 'stock'}")
    planned = runs.run(2, f"{saves} {tmp_path / 'planned'}", UNEVEN)
    assert_equal(planned, stock)
    loads = f"{PIPELINE} --eval-iters 1 --ckpt-step {NUM_ITERATIONS - 1} --load"
    assert_equal(runs.run(2, f"{loads} {tmp_path / 'planned'}"), stock)
    assert_equal(runs.run(2, f"{loads} {tmp_path / 'stock'}", UNEVEN), stock)


def test_context_parallel_ranks_compute_what_one_rank_computes_and_save_it(
    runs: ScriptRuns, tmp_path: Path
) -> None:
    every = f"{PIPELINE} --calculate-per-token-loss --eval-iters 1"
    saves = f"--context-parallel-size 2 --save-interval {NUM_ITERATIONS - 1} --save {tmp_path}"
    alone = runs.run(2, every)
    assert_equal(runs.run(4, f"{every} {saves}", UNEVEN), alone)
    assert_equal(runs.run(2, f"{every} --ckpt-step {NUM_ITERATIONS - 1} --load {tmp_path}"), alone)


def test_context_parallel_ranks_with_unequal_numbers_of_losses_run_parts_of_a_microbatch(
    runs: ScriptRuns,
) -> None:
    # Megatron averages the means of the ranks, which differs from the mean of one rank.
    layout = f"{PIPELINE} --context-parallel-size 2"
    assert_equal(runs.run(4, layout, UNEVEN), runs.run(4, layout))


def test_experts_and_tied_embeddings_on_ranks_without_data(tmp_path: Path) -> None:
    experts = "--num-experts 4 --moe-router-topk 2 --moe-layer-freq ([0,1,1,0])"
    balanced = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
    runs = ScriptRuns(
        tmp_path, GPT_SCRIPT, f"{GPT_ARGUMENTS} {experts} {balanced} --disable-bias-linear"
    )
    layout = "--pipeline-model-parallel-size 4"
    cut = {"language": {"layers": [[1, 1, 0, 0], [0, 0, 1, 1]]}}
    assert_equal(runs.run(4, layout, cut), runs.run(4, layout))
