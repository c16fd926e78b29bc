"""Two tensor-parallel ranks, with and without sequence parallelism, against one rank."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_ranks import run_modes
from models_setup import megatron_on_cpu
from models_tensor_parallel_worker import run

from megatron_dip.families.packed.initialization import tensor_parallel_shard

WORKER = Path(__file__).with_name("models_tensor_parallel_worker.py")
MODES = ("plain", "sequence", "sequence+recompute", "rotary+sequence")
# Megatron computes the loss in 32 bits whatever the model's precision is, and adds up the ranks'
# parts of the softmax in another order than one rank alone.
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-7


@pytest.fixture(scope="module")
def one_rank_of():
    with megatron_on_cpu():
        return {word: run(1, {word}) for word in ("plain", "rotary")}


@pytest.fixture(scope="module")
def all_modes(tmp_path_factory):
    return run_modes(WORKER, tmp_path_factory.mktemp("two"), MODES)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def two_ranks(mode, all_modes):
    return all_modes[mode]


@pytest.fixture
def one_rank(mode, one_rank_of):
    return one_rank_of["rotary" if "rotary" in mode else "plain"]


def assert_shards(ranks, whole, kind, tolerance):
    for rank, results in enumerate(ranks):
        assert results[kind].keys() == whole[kind].keys()
        for name, value in results[kind].items():
            marked = SimpleNamespace(**results["marks"][name])
            expected = tensor_parallel_shard(whole[kind][name], marked, rank=rank, size=2)
            # Biases that are split are zero at first.
            scale = expected.abs().max().clamp_min(1e-30)
            error = ((value - expected).abs().max() / scale).item()
            assert error <= tolerance, f"rank {rank}, {name}: relative difference {error:.1e}"


def test_ranks_start_with_their_shards_of_the_same_weights(one_rank, two_ranks):
    assert_shards(two_ranks, one_rank, "weights", 0.0)


def test_gate_and_rest_of_gated_layers_are_both_halved(two_ranks):
    name = "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    assert two_ranks[0]["marks"][name]["partition_stride"] == 2
    full = torch.arange(8.0)
    marked = SimpleNamespace(tensor_model_parallel=True, partition_dim=0, partition_stride=2)
    assert tensor_parallel_shard(full, marked, rank=1, size=2).tolist() == [2, 3, 6, 7]


def test_every_rank_has_all_image_features(one_rank, two_ranks):
    for results in two_ranks:
        torch.testing.assert_close(
            results["features"], one_rank["features"], rtol=1e-12, atol=1e-12
        )


def test_every_rank_sends_its_part_of_the_features(one_rank, two_ranks):
    num_rows = one_rank["sent rows"]
    assert num_rows % 2 == 1, "rows that do not divide are filled up"
    assert [results["sent rows"] for results in two_ranks] == [(num_rows + 1) // 2] * 2


def test_every_rank_has_the_losses_of_all_tokens(one_rank, two_ranks):
    for results in two_ranks:
        torch.testing.assert_close(
            results["losses"], one_rank["losses"], rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE
        )


def test_every_rank_has_the_complete_gradient_of_the_features(one_rank, two_ranks):
    expected = one_rank["features gradient"]
    for results in two_ranks:
        torch.testing.assert_close(
            results["features gradient"],
            expected,
            rtol=0,
            atol=GRADIENT_TOLERANCE * expected.abs().max(),
        )


def test_every_gradient_is_that_of_one_rank(one_rank, two_ranks):
    assert_shards(two_ranks, one_rank, "gradients", GRADIENT_TOLERANCE)
