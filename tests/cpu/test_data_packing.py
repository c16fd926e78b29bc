"""Packing: nothing lost, nothing too long, repeatable, and different enough."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.errors import DataError
from megatron_dip.families.data.packing import PackingOptions, pack_epoch

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=60)
OPTIONS = st.builds(PackingOptions, separation=st.floats(0, 1), num_open=st.integers(1, 9))


def pack(samples, options, seed=3, epoch=0, seq_length=100):
    lengths = [length for length, _ in samples]
    has_images = [images for _, images in samples]
    return pack_epoch(
        lengths, has_images, seq_length=seq_length, seed=seed, epoch=epoch, options=options
    )


def many(num: int) -> list[tuple[int, bool]]:
    random = np.random.default_rng(1)
    lengths = random.integers(5, 60, num).tolist()
    return list(zip(lengths, (random.random(num) < 0.5).tolist(), strict=True))


@given(samples=SAMPLES, options=OPTIONS, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_sample_is_packed_once_and_nothing_is_too_long(samples, options, seed, epoch):
    packs = pack(samples, options, seed, epoch)
    assert Counter(sample for one in packs for sample in one) == Counter(range(len(samples)))
    for one in packs:
        assert 0 < sum(samples[sample][0] for sample in one) <= 100


@given(samples=SAMPLES, options=OPTIONS, epoch=st.integers(0, 3))
def test_packing_is_repeatable(samples, options, epoch):
    assert pack(samples, options, epoch=epoch) == pack(samples, options, epoch=epoch)


def test_epochs_and_seeds_differ():
    samples = many(100)
    options = PackingOptions()
    first = pack(samples, options)
    assert first != pack(samples, options, epoch=1)
    assert first != pack(samples, options, seed=4)


def test_full_separation_never_mixes_kinds_and_none_does():
    samples = many(200)

    def num_mixed(separation: float) -> int:
        packs = pack(samples, PackingOptions(separation=separation))
        return sum(len({samples[sample][1] for sample in one}) == 2 for one in packs)

    assert num_mixed(1.0) == 0
    assert num_mixed(0.0) > num_mixed(0.5) > 0


def test_packs_are_nearly_full():
    samples = many(400)
    packs = pack(samples, PackingOptions())
    assert sum(length for length, _ in samples) / (100 * len(packs)) > 0.85


def test_a_sample_that_does_not_fit_is_reported():
    assert pack([(100, False)], PackingOptions()) == ((0,),)
    with pytest.raises(DataError, match=r"sample 0 has 101 tokens.*sequence length 100"):
        pack([(101, False)], PackingOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"separation": 1.5}, "separation is 1.5"), ({"num_open": 0}, "num_open is 0")],
)
def test_options_out_of_range_are_reported(options, message):
    with pytest.raises(DataError, match=message):
        PackingOptions(**options)
