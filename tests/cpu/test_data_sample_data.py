"""The sample data set: real, repeatable, and good to train on."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.index import build_index
from megatron_dip.families.data.sources import DataSettings
from megatron_dip.families.data.statistics import microbatch_statistics
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.sample_data.image_text import (
    SampleDataOptions,
    make_sample_data,
    measure,
)
from megatron_dip.families.sample_data.photos import PHOTOS, photo_folder
from megatron_dip.families.vlm.dataset import VlmDataset

OPTIONS = SampleDataOptions(num_image_samples=60, num_text_samples=40, vocab_size=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    make_sample_data(folder, OPTIONS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_seed_makes_the_same_files(folder, tmp_path):
    make_sample_data(tmp_path / "again", OPTIONS)
    assert contents(tmp_path / "again") == contents(folder)


def test_all_photographs_ship_with_the_package():
    assert [photo.file for photo in PHOTOS if not (photo_folder() / photo.file).exists()] == []


def test_every_sample_is_good_and_microbatches_vary(folder):
    settings = DataSettings(
        samples=folder / "samples.json",
        image_folder=folder / "images",
        tokenizer=folder / "tokenizer.json",
        seq_length=512,
        patch_size=14,
        min_image_tokens=4,
        max_image_tokens=64,
    )
    index, _ = build_index(settings, folder, show_progress=False)
    assert [record.error for record in index.samples if record.error] == []
    assert sum(not record.images for record in index.samples) == 40
    assert max(len(record.images) for record in index.samples) > 1
    dataset = VlmDataset(settings, index, num_samples=40, seed=1)
    statistics = microbatch_statistics(dataset, num_microbatches=40, micro_batch_size=1)
    patches = next(one for one in statistics if one.name == "patches (vision)")
    assert patches.quantile(0.9) > 2 * patches.quantile(0.2)


def test_answers_tell_what_the_pixels_say(folder):
    checked = 0
    for sample in json.loads((folder / "samples.json").read_text(encoding="utf-8")):
        for turn in sample["conversations"]:
            if turn["value"].startswith("What shape is the image") or "of 255" in turn["value"]:
                image = decode_image(folder / "images" / sample["image"])
                said = sample["conversations"]
                text = " ".join(one["value"] for one in said)
                if " by " in text and " pixels" in text:
                    assert f"{image.width} by {image.height} pixels" in text
                    checked += 1
    assert checked > 5
    assert measure(Image.new("RGB", (4, 4), (200, 40, 40))) == (88, "red")


SCRIPT = Path(__file__).parents[2] / "scripts" / "make_sample_data.py"


def test_the_script_writes_a_summary_and_the_origins(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--num-images", "5"]
    done = subprocess.run(
        [*command, "--num-texts", "2", "--vocab-size", "300"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "samples" in done.stdout
    assert "CC0" in (tmp_path / "out" / "images" / "README.md").read_text(encoding="utf-8")


def test_the_script_refuses_a_vocabulary_without_room(tmp_path):
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["main"])
    arguments = [str(tmp_path), "--num-images", "1", "--num-texts", "1", "--vocab-size", "10"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "vocab_size is 10; expected at least" in done.output


def test_long_answers_are_cut_to_the_limit_of_tokens(tmp_path):
    summary = make_sample_data(tmp_path, replace(OPTIONS, num_image_samples=1, max_text_tokens=50))
    assert summary.num_text_only == 40
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    samples = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    lengths = [len(tokenizer.encode_text(s["conversations"][-1]["value"])) for s in samples[1:]]
    assert 40 < max(lengths) <= 50
