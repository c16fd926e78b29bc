"""A user's GPT script trains alike in every pair of layout, optimizer and precision.

``benchmarks/equality_pairs.py`` compares each of these runs with Megatron's schedule in the very
same layout, also of a model with an encoder.  Here those in 32 bits are compared with one rank.
"""

import pytest
from any_model_runs import GPT_ARGUMENTS, GPT_SCRIPT, ScriptRuns, assert_equal
from layout_pairs import COMBINATIONS, Combination, uncovered_pairs
from training_runs import TrainingRun


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ScriptRuns:
    arguments = f"{GPT_ARGUMENTS} --untie-embeddings-and-output-weights --eval-iters 1"
    return ScriptRuns(tmp_path_factory.mktemp("pairs"), GPT_SCRIPT, arguments)


@pytest.fixture(scope="module")
def one_rank(runs: ScriptRuns) -> TrainingRun:
    return runs.run(1, "")


def test_every_pair_of_values_is_run() -> None:
    assert uncovered_pairs() == set()


@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: case.name)
def test_plans_train_as_megatrons_schedule(
    runs: ScriptRuns, one_rank: TrainingRun, case: Combination
) -> None:
    planned = runs.run(case.num_processes, case.arguments, case.gpt_cut)
    is_exact = not case.in_16_bits
    assert_equal(planned, one_rank if is_exact else runs.run(case.num_processes, case.arguments))
