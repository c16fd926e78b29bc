"""Initial weights: random numbers by place, and which distributions are known."""

import statistics
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed import initialization
from megatron_dip.families.packed.counter_random import (
    draw_normal,
    draw_uniform,
    normal_quantile,
    philox,
)
from megatron_dip.families.packed.initialization import tensor_parallel_shard

# Of Random123, kat_vectors: "philox4x32 10".
PHILOX_ANSWERS = [
    ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("given", "expected"), PHILOX_ANSWERS)
def test_words_are_those_of_the_published_generator(given, expected):
    # Arrays, because numpy warns of scalars that overflow.
    *counter, low_key, high_key = (np.array([word], dtype=np.uint64) for word in given)
    words = philox.py_func(low_key, high_key, tuple(counter))
    assert [int(word[0]) for word in words] == expected


@pytest.mark.parametrize("probability", [2e-10, 1e-5, 0.03, 0.3, 0.5, 0.9, 0.99, 1 - 1e-7])
def test_normal_quantiles_have_seven_digits(probability):
    expected = statistics.NormalDist().inv_cdf(probability)
    assert normal_quantile.py_func(probability) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform])
def test_a_part_of_a_matrix_is_drawn_as_in_the_whole(draw):
    whole = np.empty((9, 33), np.float32)
    draw(whole, 2**64 - 1)
    part = np.empty((4, 10), np.float32)
    draw(part, 2**64 - 1, (3, 6))
    np.testing.assert_array_equal(part, whole[3:7, 6:16])
    other = np.empty_like(whole)
    draw(other, 2**64 - 2)
    assert not (other == whole).any()
    assert len(np.unique(whole)) == whole.size


def test_values_have_the_deviation_and_the_range_that_are_asked_for():
    values = np.empty((64, 1000), np.float32)
    draw_normal(values, 3, mean=1.0, deviation=0.5)
    assert values.mean() == pytest.approx(1.0, abs=0.01)
    assert values.std() == pytest.approx(0.5, rel=0.01)
    draw_uniform(values, 3, low=-2.0, high=4.0)
    assert -2.0 < values.min() < -1.99
    assert 3.99 < values.max() < 4.0
    assert values.mean() == pytest.approx(1.0, abs=0.02)


def drawn(shape, init_method, *, rank=0, size=1, dimension=None, stride=1):
    parameter = torch.empty(shape)
    if dimension is not None:
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = dimension, stride
    return initialization._draw_shard(parameter, init_method, "1:name", rank=rank, size=size)


@pytest.mark.parametrize(
    ("shape", "dimension", "stride"),
    [((16,), 0, 1), ((8, 6), 0, 1), ((8, 12), 1, 1), ((8, 6), 0, 2), ((4, 8, 3), 1, 1)],
)
def test_every_rank_draws_its_shard_of_the_whole(shape, dimension, stride):
    init_method = partial(torch.nn.init.normal_, mean=0.0, std=0.1)
    whole = drawn(shape, init_method)
    marks = SimpleNamespace(
        tensor_model_parallel=True, partition_dim=dimension, partition_stride=stride
    )
    own = list(shape)
    own[dimension] //= 4
    for rank in range(4):
        shard = drawn(own, init_method, rank=rank, size=4, dimension=dimension, stride=stride)
        expected = tensor_parallel_shard(whole, marks, rank=rank, size=4)
        torch.testing.assert_close(shard, expected, rtol=0, atol=0)


def test_xavier_is_bounded_by_the_whole_weight_and_not_by_the_shard():
    shard = drawn((25, 400), torch.nn.init.xavier_uniform_, rank=1, size=4, dimension=0)
    bound = (6 / (100 + 400)) ** 0.5
    assert 0.99 * bound < shard.abs().max() < bound


def test_a_distribution_that_is_not_known_is_refused():
    with pytest.raises(UnsupportedError, match=r"kaiming_normal_.*expected normal_, uniform_"):
        drawn((4, 4), torch.nn.init.kaiming_normal_)
