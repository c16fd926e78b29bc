"""Stages under CPU mode, where Megatron's random states and checkpoints work as on a GPU."""

from pathlib import Path

import pytest
from forked_ranks import fork_ranks

WORKER = Path(__file__).with_name("models_cpu_mode_worker.py")


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "saved").mkdir()
    command = [str(WORKER), str(folder / "saved")]
    return fork_ranks(folder / "run", 1, command, timeout_seconds=180)[0]


def test_dropout_repeats_in_recomputed_layers(completed):
    assert "dropout repeats in recomputed layers" in completed.output, completed.output


def test_a_checkpoint_is_read_into_another_cut(completed):
    assert "a checkpoint was read into another cut" in completed.output, completed.output
    assert completed.returncode == 0
