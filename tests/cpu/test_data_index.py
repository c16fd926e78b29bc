"""The index: made once, named faults, and ranks that wait for it."""

import json
import logging
import os
from dataclasses import replace

import pytest
from tiny_data_set import make_settings, sample_of, with_samples

from megatron_dip.errors import DataError
from megatron_dip.families.data import sources as sources_module
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.images import choose_grid
from megatron_dip.families.data.index import (
    build_index,
    index_digest,
    index_path,
    load_index,
    split_samples,
    usable_samples,
)


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path / "data")


def build(settings, folder):
    return build_index(settings, folder, show_progress=False)[0]


def test_the_index_knows_text_tokens_and_images_of_every_sample(settings, tmp_path):
    index, path = build_index(settings, tmp_path, show_progress=False)
    raw = json.loads(settings.samples.read_text())
    assert len(index.samples) == len(raw)
    for record, sample in zip(index.samples, raw, strict=True):
        assert record.error is None
        assert len(record.images) == len(sample.get("image", []))
        for image, name in zip(record.images, sample.get("image", []), strict=True):
            size = decode_image(settings.image_folder / name).size
            assert (image.width, image.height) == size
            assert image.grid == choose_grid(*size, settings.limits)
        image_tokens = sum(image.grid.num_tokens for image in record.images)
        assert record.num_tokens == record.num_text_tokens + image_tokens
    assert load_index(path) == index
    assert path == index_path(index_digest(settings), tmp_path)


def test_the_index_is_made_once(settings, tmp_path, monkeypatch):
    first = build(settings, tmp_path)

    def no_decoding(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources_module, "decode_image", no_decoding)
    assert build(settings, tmp_path) == first
    with pytest.raises(AssertionError, match="decoded again"):
        build(replace(settings, max_image_tokens=8), tmp_path)


def test_everything_that_the_index_depends_on_changes_its_digest(settings):
    digests = {index_digest(settings)}
    for field in ("seq_length", "patch_size", "merge_size", "min_image_tokens", "max_image_tokens"):
        digests.add(index_digest(replace(settings, **{field: getattr(settings, field) + 1})))
    image = settings.image_folder / "0.jpg"
    os.utime(image, ns=(1, 1))
    digests.add(index_digest(settings))
    image.unlink()
    digests.add(index_digest(settings))
    settings.tokenizer.write_text(settings.tokenizer.read_text() + "\n")
    digests.add(index_digest(settings))
    settings.samples.write_text(settings.samples.read_text() + "\n")
    digests.add(index_digest(settings))
    assert len(digests) == 10


def test_a_damaged_index_is_reported_and_made_again(settings, tmp_path, caplog):
    index, path = build_index(settings, tmp_path, show_progress=False)
    for content in ("[", "{}", json.dumps({"format": "megatron-dip/data-index", "version": 0})):
        path.write_text(content)
        with pytest.raises(DataError, match=path.name):
            load_index(path)
        assert build(settings, tmp_path) == index
        assert "the index is made again" in caplog.text
        assert load_index(path) == index


def test_an_index_that_is_damaged_anywhere_is_made_again(settings, tmp_path):
    index, path = build_index(settings, tmp_path, show_progress=False)
    whole = path.read_bytes()
    digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
    for place in (*range(0, len(whole), len(whole) // 25), *digits[:: len(digits) // 25]):
        # Another digit where there was one: still JSON, still an index.
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=path.name):
            load_index(path)
    for length in range(0, len(whole), len(whole) // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=path.name):
            load_index(path)
    assert build(settings, tmp_path) == index and load_index(path) == index


BROKEN = [
    (sample_of("gone", "gone.png"), r"'gone' \(number 1\): image .*gone\.png: no such file"),
    (sample_of("cut", "cut.jpg"), r"'cut' \(number 1\): image .*cut\.jpg: is cut short"),
    (
        sample_of("long", answer="words " * 200),
        r"'long' \(number 1\): \d+ tokens \(\d+ of text, 0 of images\), longer than the "
        r"sequence length 120; shorten it, raise seq_length",
    ),
    (sample_of("marks", "0.jpg") | {"image": []}, r"'marks'.* 1 <image> marks .* 0 images"),
]


@pytest.mark.parametrize(("sample", "message"), BROKEN)
def test_a_bad_sample_is_named_with_its_file(settings, tmp_path, sample, message):
    content = (settings.image_folder / "4.jpg").read_bytes()
    (settings.image_folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    good = sample_of("good", "0.jpg")
    index = build(with_samples(settings, [good, sample]), tmp_path)
    with pytest.raises(DataError, match=rf"samples\.json: sample {message}"):
        usable_samples(index, skip_bad_samples=False)
    assert usable_samples(index, skip_bad_samples=True) == (0,)
    index = build(with_samples(settings, [good]), tmp_path)
    assert usable_samples(index, skip_bad_samples=False) == (0,)


def test_skipped_samples_are_counted_and_the_first_are_named(settings, tmp_path, caplog):
    bad = [sample_of(f"bad{number}", "gone.png") for number in range(5)]
    index = build(with_samples(settings, [*bad, sample_of("good")]), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert usable_samples(index, skip_bad_samples=True) == (5,)
    assert "left out 5 bad of 6 samples" in caplog.text
    assert "'bad2'" in caplog.text and "'bad3'" not in caplog.text
    with pytest.raises(DataError, match=r"'bad0'.*and 4 more bad samples"):
        usable_samples(index, skip_bad_samples=False)


def test_a_data_set_of_bad_samples_only_is_refused(settings, tmp_path):
    index = build(with_samples(settings, [sample_of("bad", "gone.png")]), tmp_path)
    with pytest.raises(DataError, match="all 1 samples are bad; the first: sample 'bad'"):
        usable_samples(index, skip_bad_samples=True)


def test_a_failed_write_leaves_nothing_behind(settings, tmp_path, monkeypatch):
    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        build(settings, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_samples_are_split_repeatably_and_completely():
    numbers = range(10, 30)
    train, valid = split_samples(numbers, 0.25, seed=1)
    assert sorted(train + valid) == list(numbers) and len(valid) == 5
    assert split_samples(numbers, 0.25, seed=1) == (train, valid)
    assert split_samples(numbers, 0.25, seed=2) != (train, valid)
    with pytest.raises(DataError, match=r"share of 0\.0 of 20 samples"):
        split_samples(numbers, 0.0, seed=1)


@pytest.mark.parametrize("count", range(1, 11))
def test_few_samples_are_all_trained_on_where_nothing_is_evaluated(count):
    numbers = range(count)
    assert split_samples(numbers, 0.05, seed=1, needs_valid=False) == (tuple(numbers), ())
    with pytest.raises(DataError, match=f"of {count} samples .* leave evaluation out"):
        split_samples(numbers, 0.05, seed=1)


def test_what_is_trained_on_does_not_depend_on_evaluation_where_there_is_enough():
    numbers = range(40)
    assert split_samples(numbers, 0.1, 1, needs_valid=False) == split_samples(numbers, 0.1, 1)
