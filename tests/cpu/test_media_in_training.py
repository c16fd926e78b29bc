"""What the index accepts, training can read; what goes bad after that is named or stood in for."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing_runs import run_vlm
from launching import REPOSITORY
from PIL import Image
from tiny_data_set import conversation
from tiny_lavin import SEQUENCE_LENGTH, make_tiny_scienceqa, write_lavin_config

from megatron_dip.errors import DataError
from megatron_dip.families.data.images import ImageLimits
from megatron_dip.families.data.index import build_index, usable_samples
from megatron_dip.families.data.sources import DataSettings
from megatron_dip.families.data.tokenizer import train_tokenizer
from megatron_dip.families.lavin.dataset import LavinDataset, LavinSettings
from megatron_dip.families.lavin.image_check import ImageFiles, check_images, split_by_images
from megatron_dip.families.lavin.scienceqa import read_scienceqa, to_instruction
from megatron_dip.families.omni.data import OmniDataset, OmniSettings, build_omni_index
from megatron_dip.families.sample_data.sounds import SampleSoundOptions, make_sample_sounds
from megatron_dip.families.vlm.dataset import VlmDataset

NUM_SAMPLES = 24


def make_vlm(folder: Path, *, skip: bool) -> tuple[Any, Path]:
    """A data set whose sample 0 has an image, and that image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    samples = []
    for number in range(NUM_SAMPLES):
        pixels = random.integers(0, 256, (40, 40 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        turns = conversation("<image> What?", "A thing.")
        samples.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(samples))
    train_tokenizer(["What? A thing."], 300, folder / "tokenizer.json")
    settings = DataSettings(
        samples=folder / "samples.json",
        image_folder=folder / "images",
        tokenizer=folder / "tokenizer.json",
        seq_length=64,
        patch_size=4,
        min_image_tokens=2,
        max_image_tokens=12,
    )
    index, _ = build_index(settings, folder, show_progress=False)
    dataset = VlmDataset(settings, index, num_samples=NUM_SAMPLES, seed=1, skip_bad_samples=skip)
    return dataset, folder / "images" / "0.png"


def omni_settings(folder: Path) -> OmniSettings:
    return OmniSettings(
        samples=folder / "samples.json",
        media_folder=folder / "media",
        tokenizer=folder / "tokenizer.json",
        seq_length=160,
        limits=ImageLimits(4, 2, 12),
        audio_rate=8000,
        num_mels=16,
    )


def make_omni(folder: Path, *, skip: bool, field: str = "image") -> tuple[Any, Path]:
    options = SampleSoundOptions(
        num_samples=NUM_SAMPLES, rate=8000, lengths_s=(0.1, 0.25), side=32, vocab_size=300
    )
    make_sample_sounds(folder, options)
    samples = json.loads((folder / "samples.json").read_text())
    settings = omni_settings(folder)
    index, _ = build_omni_index(settings, folder)
    dataset = OmniDataset(
        settings,
        index,
        num_samples=NUM_SAMPLES,
        seed=1,
        subset=range(NUM_SAMPLES),
        skip_bad_samples=skip,
    )
    return dataset, folder / "media" / next(s[field] for s in samples if field in s)


def make_sound(folder: Path, *, skip: bool) -> tuple[Any, Path]:
    return make_omni(folder, skip=skip, field="audio")


def lavin_parts(folder: Path) -> tuple[LavinSettings, list[Any], list[str]]:
    settings = LavinSettings(
        tokenizer=folder / "tokenizer.json",
        image_folder=folder / "images",
        image_size=42,
        patch_size=14,
        num_features=3,
        seq_length=SEQUENCE_LENGTH,
    )
    found = read_scienceqa(folder / "problems.json", folder / "pid_splits.json", "train")
    samples = [to_instruction(problem) for problem in found.problems]
    names = tuple(str(sample.image) for sample in samples if sample.image)
    files = ImageFiles(samples=folder / "problems.json", folder=settings.image_folder, names=names)
    bad, _ = check_images(files, folder, show_progress=False)
    good, errors = split_by_images(samples, bad)
    return settings, good, errors


def make_lavin(folder: Path, *, skip: bool) -> tuple[Any, Path]:
    make_tiny_scienceqa(folder, num_problems=NUM_SAMPLES)
    settings, good, errors = lavin_parts(folder)
    dataset = LavinDataset(
        settings, good, errors=errors, num_samples=len(good), seed=1, skip_bad_samples=skip
    )
    return dataset, folder / "images" / "train" / "0" / "image.png"


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def exchange(path: Path) -> None:
    if path.suffix == ".wav":
        content = path.read_bytes()
        # A whole file of another length.
        data = content[44:] + bytes(4000)
        sizes = [(36 + len(data)).to_bytes(4, "little"), len(data).to_bytes(4, "little")]
        path.write_bytes(content[:4] + sizes[0] + content[8:40] + sizes[1] + data)
    else:
        Image.new("RGB", (90, 30)).save(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAMILIES = {"vlm": make_vlm, "omni": make_omni, "sound": make_sound, "lavin": make_lavin}
CHANGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "exchanged": exchange,
    "deleted": Path.unlink,
    "folder": into_folder,
}
# Images of LaVIN have one size whatever they were.
CASES = [(f, c) for f in FAMILIES for c in CHANGES if (f, c) != ("lavin", "exchanged")]


@pytest.mark.parametrize(("family", "change"), CASES)
def test_a_file_that_goes_bad_after_indexing_is_named_with_its_sample(
    tmp_path: Path, family: str, change: str
):
    dataset, path = FAMILIES[family](tmp_path, skip=False)
    CHANGES[change](path)
    told = set()
    for i in range(len(dataset)):
        try:
            dataset[i]
        except DataError as error:
            told.add(str(error))
    assert told
    for line in told:
        assert path.name in line and "start again" in line and line.isprintable(), line
        assert any(mark in line for mark in ("sample '", "sample number ", "problem ")), line


@pytest.mark.parametrize(("family", "change"), CASES)
def test_where_bad_samples_are_skipped_a_blank_of_the_same_size_takes_its_place(
    tmp_path: Path, family: str, change: str, caplog: pytest.LogCaptureFixture
):
    dataset, path = FAMILIES[family](tmp_path, skip=True)
    before = [dataset[i] for i in range(len(dataset))]
    CHANGES[change](path)
    with caplog.at_level(logging.WARNING, "megatron_dip"):
        after = [dataset[i] for i in range(len(dataset))]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) >= 1 and all(path.name in line for line in warnings)
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
    sizes = [dataset.collate_fn(items).metadata() for items in (after, before)]
    assert sizes[0] == sizes[1]


def test_many_bad_files_in_a_row_end_a_run_that_skips_bad_samples(tmp_path: Path):
    dataset, path = make_vlm(tmp_path, skip=True)
    shutil.rmtree(path.parent)
    with pytest.raises(DataError, match="10 files in a row were good when the index was made"):
        for i in range(len(dataset)):
            dataset[i]


@pytest.mark.parametrize("field", ["image", "audio"])
@pytest.mark.parametrize("value", [5, ["a.png"], {"path": "a.png"}, True, ""])
def test_a_field_that_names_no_file_is_a_bad_sample(tmp_path: Path, field: str, value: Any):
    make_omni(tmp_path, skip=False)
    samples = json.loads((tmp_path / "samples.json").read_text())
    samples[3][field] = value
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    dataset = make_omni_again(tmp_path)
    assert len(dataset) == NUM_SAMPLES
    for i in range(len(dataset)):
        dataset[i]


def make_omni_again(folder: Path) -> OmniDataset:
    """Over samples that a test has changed: one of them must be bad."""
    settings = omni_settings(folder)
    index, _ = build_omni_index(settings, folder)
    with pytest.raises(DataError, match=r"\(number 3\)"):
        usable_samples(index, skip_bad_samples=False)
    return OmniDataset(
        settings,
        index,
        num_samples=NUM_SAMPLES,
        seed=1,
        subset=range(NUM_SAMPLES),
        skip_bad_samples=True,
    )


def test_bad_images_of_lavin_are_found_before_training_and_named_with_their_problem(
    tmp_path: Path,
):
    make_tiny_scienceqa(tmp_path, num_problems=NUM_SAMPLES)
    images = tmp_path / "images" / "train"
    truncate(images / "3" / "image.png")
    (images / "5" / "image.png").unlink()
    settings, good, errors = lavin_parts(tmp_path)
    assert [error.split(":")[0] for error in errors] == ["problem 3", "problem 5"]
    assert "is cut short" in errors[0] and "no such file" in errors[1]
    with pytest.raises(DataError, match=r"problem 3: image .*cut short.* \(and 1 more bad"):
        LavinDataset(settings, good, errors=errors, num_samples=4, seed=1)
    kept = list(tmp_path.glob("image-check-*.json"))
    assert lavin_parts(tmp_path)[2] == errors and list(tmp_path.glob("image-check-*")) == kept
    Image.new("RGB", (9, 9)).save(images / "3" / "image.png")
    assert [error.split(":")[0] for error in lavin_parts(tmp_path)[2]] == ["problem 5"]


def test_a_run_goes_on_without_a_truncated_image_of_lavin(tmp_path: Path):
    data = tmp_path / "data"
    make_tiny_scienceqa(data, num_problems=NUM_SAMPLES)
    truncate(data / "images" / "train" / "3" / "image.png")
    config = write_lavin_config(tmp_path / "config.yaml", data, num_ranks=1)
    script = REPOSITORY / "examples" / "finetune_lavin.py"
    flags = ("--dip-config", str(config), "--dip-schedule", "--global-batch-size", "8")
    (rank,) = run_vlm(tmp_path / "run", 1, *flags, "--skip-bad-samples", script=script)
    assert rank.returncode == 0, rank.output[-3000:]
    assert "left out 1 bad" in rank.output and "problem 3: image" in rank.output
    assert "iteration        2/" in rank.output
