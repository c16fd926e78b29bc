"""Stages under CPU mode, where Megatron's random states and checkpoints work as on a GPU."""

import sys
from pathlib import Path

import pytest
from launching import run_ranks

WORKER = Path(__file__).with_name("models_cpu_mode_worker.py")


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (rank,) = run_ranks(1, [sys.executable, str(WORKER), str(folder)], timeout_seconds=120)
    return rank


def test_dropout_repeats_in_recomputed_layers(completed):
    assert "dropout repeats in recomputed layers" in completed.output, completed.output


def test_a_checkpoint_is_read_into_another_cut(completed):
    assert "a checkpoint was read into another cut" in completed.output, completed.output
    assert completed.returncode == 0
