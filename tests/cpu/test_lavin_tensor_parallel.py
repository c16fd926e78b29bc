"""LaVIN on two tensor-parallel ranks, with and without sequence parallelism, against one rank."""

from pathlib import Path

import pytest
import torch
from forked_ranks import run_modes
from lavin_tensor_parallel_worker import run
from models_setup import megatron_on_cpu

WORKER = Path(__file__).with_name("lavin_tensor_parallel_worker.py")
MODES = ("token", "token+sequence", "token+sequence+recompute", "public_code+sequence")
# Megatron computes the loss in 32 bits whatever the model's precision is.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def one_rank():
    with megatron_on_cpu():
        return {mode: run(1, [mode]) for mode in ("token", "public_code")}


@pytest.fixture(scope="module")
def all_modes(tmp_path_factory):
    return run_modes(WORKER, tmp_path_factory.mktemp("two"), MODES)


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_every_gradient_are_those_of_one_rank(mode, one_rank, all_modes):
    expected = one_rank[mode.split("+")[0]]
    for rank in all_modes[mode]:
        torch.testing.assert_close(
            rank["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE
        )
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = gradient.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(
                rank["gradients"][name], gradient, rtol=0, atol=TOLERANCE * scale
            )


def test_ranks_agree_on_adapters_and_on_the_identity_of_the_towers(one_rank, all_modes):
    expected = one_rank["token"]
    for rank in all_modes["token+sequence"]:
        assert rank["digest"] == expected["digest"]
        for name, value in expected["adapters"].items():
            assert torch.equal(rank["adapters"][name], value), name
