"""Stages of Transformer Engine's modules, without a GPU: see ``stand_in_te``."""

import sys
from pathlib import Path

import pytest
from launching import REPOSITORY, run_ranks

STAND_IN = Path(__file__).with_name("stand_in_te")
WORKER = Path(__file__).with_name("te_stages_worker.py")


def run_with_stand_in(num_ranks, script, *arguments):
    """The last rank's output."""
    command = [sys.executable, "-m", "megatron_dip.launch", "--cpu", str(script), *arguments]
    path = {"PYTHONPATH": f"{REPOSITORY}:{STAND_IN}"}
    ranks = run_ranks(num_ranks, command, 280.0, env=path)
    for rank, completed in enumerate(ranks):
        assert completed.returncode == 0, f"rank {rank}:\n{completed.output[-4000:]}"
    return ranks[-1].output


@pytest.mark.parametrize(
    ("num_ranks", "recipes"), [(1, ("none", "mxfp8")), (2, ("delayed",))], ids=["alone", "sharded"]
)
def test_stages_of_transformer_engine_compute_what_local_ones_do(num_ranks, recipes):
    output = run_with_stand_in(num_ranks, WORKER, *recipes)
    assert output.count("as local layers") == len(recipes)
