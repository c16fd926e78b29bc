"""A tiny data set on disk, for the tests of index and data set."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_dip.families.data.sources import DataSettings
from megatron_dip.families.data.tokenizer import train_tokenizer

__all__ = ["conversation", "make_settings", "sample_of", "with_samples"]


def conversation(*turns: str) -> list[dict[str, str]]:
    """Turns of human and gpt by turns."""
    return [
        {"from": role, "value": text}
        for role, text in zip(["human", "gpt"] * len(turns), turns, strict=False)
    ]


def sample_of(name: str, *images: str, answer: str = "A picture.") -> dict[str, Any]:
    """A sample that asks what is on the images."""
    marks = "<image>" * len(images)
    sample = {"id": name, "conversations": conversation(f"{marks}What is this?", answer)}
    return sample | ({"image": list(images)} if images else {})


def make_settings(folder: Path, *, num_samples: int = 24, seq_length: int = 120) -> DataSettings:
    """Images of many sizes; every third sample has none, every fifth has two."""
    images = folder / "images"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        size = (20 + 17 * number, 90 - 11 * number, 3)
        pixels = random.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.{'png' if number % 2 else 'jpg'}")
    names = sorted(path.name for path in images.iterdir())
    samples = []
    for number in range(num_samples):
        count = 0 if number % 3 == 0 else 2 if number % 5 == 0 else 1
        chosen = [names[(number + shift) % len(names)] for shift in range(count)]
        samples.append(sample_of(f"s{number}", *chosen, answer=f"It is number {number}. " * 2))
    train_tokenizer(
        [turn["value"] for s in samples for turn in s["conversations"]],
        300,
        folder / "tokenizer.json",
    )
    settings = DataSettings(
        samples=folder / "samples.json",
        image_folder=images,
        tokenizer=folder / "tokenizer.json",
        seq_length=seq_length,
        patch_size=4,
        merge_size=3,
        min_image_tokens=2,
        max_image_tokens=16,
    )
    return with_samples(settings, samples)


def with_samples(settings: DataSettings, samples: list[Any]) -> DataSettings:
    """The same settings, the file of the samples written anew."""
    settings.samples.write_text(json.dumps(samples))
    return replace(settings)
