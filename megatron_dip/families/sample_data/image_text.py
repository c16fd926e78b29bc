"""A small real data set, made without a network.

Crops of the photographs that ship inside scikit-image, at many sizes and aspect ratios, with
conversations about what is really there: the subject, which part was cut out, and its size,
brightness and mean color as measured from the pixels.  To these come samples with several images
and samples of text alone.  The same arguments give the same files.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.tokenizer import VlmTokenizer, train_tokenizer
from megatron_dip.families.sample_data.photos import PHOTOS, Photo, photo_folder
from megatron_dip.families.sample_data.texts import excerpt, text_samples
from megatron_dip.files import write_atomically

__all__ = [
    "COLORS",
    "Crop",
    "SampleDataOptions",
    "SampleDataSummary",
    "cut_photo",
    "make_sample_data",
    "measure",
]

COLORS = {
    "black": (20, 20, 20),
    "dark gray": (70, 70, 70),
    "gray": (128, 128, 128),
    "light gray": (190, 190, 190),
    "white": (240, 240, 240),
    "red": (190, 50, 45),
    "brown": (120, 80, 50),
    "orange": (225, 130, 60),
    "yellow": (220, 200, 70),
    "green": (70, 130, 70),
    "blue": (60, 80, 150),
    "light blue": (140, 170, 210),
    "purple": (120, 70, 130),
    "pink": (225, 170, 170),
}
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_LARGEST_ASPECT = 3.0
_SMALLEST_AREA, _LARGEST_AREA = 56**2, 560**2
_LARGEST_ENLARGEMENT = 2.0
_SHARE_WITH_SEVERAL_IMAGES = 0.2
_SHARE_PNG = 0.25
_SHARE_TURNED = 0.1


@dataclass(frozen=True, kw_only=True)
class SampleDataOptions:
    """How much is made."""

    num_image_samples: int = 300
    num_text_samples: int = 200
    vocab_size: int = 3000
    seed: int = 1234
    max_text_characters: int = 1400
    """Longest answer of a text-only sample."""
    max_text_tokens: int = 400
    """The same in tokens: code and tables take more of them for a character than prose."""


@dataclass(frozen=True, kw_only=True)
class SampleDataSummary:
    """What was made."""

    num_samples: int
    num_images: int
    num_with_several_images: int
    num_text_only: int
    vocab_size: int
    image_bytes: int


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A part of a photograph, saved as a file of its own."""

    name: str
    photo: Photo
    place: str
    width: int
    height: int
    brightness: int
    """Mean of the grey values, 0 to 255."""
    color: str


def measure(image: Image.Image) -> tuple[int, str]:
    """(mean grey value, name of the color nearest to the mean) of an RGB image."""
    mean = np.asarray(image, dtype=np.float64).reshape(-1, 3).mean(axis=0)
    brightness = round(float(mean @ np.array([0.299, 0.587, 0.114])))
    nearest = min(COLORS, key=lambda name: float(np.square(mean - COLORS[name]).sum()))
    return brightness, nearest


def cut_photo(photo: Image.Image, generator: random.Random) -> tuple[Image.Image, str]:
    """A random part of a photograph at a random size, and where it was cut out."""
    aspect = _LARGEST_ASPECT ** generator.uniform(-1, 1)
    area = _SMALLEST_AREA * (_LARGEST_AREA / _SMALLEST_AREA) ** generator.random()
    out_width, out_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    # The smallest cut is one that is not enlarged beyond what still looks like a photograph.
    full = min(photo.width / out_width, photo.height / out_height)
    scale = full * generator.uniform(min(1 / _LARGEST_ENLARGEMENT / full, 1.0), 1.0)
    width = min(max(round(out_width * scale), 1), photo.width)
    height = min(max(round(out_height * scale), 1), photo.height)
    left = generator.randint(0, photo.width - width)
    top = generator.randint(0, photo.height - height)
    column = min(3 * (2 * left + width) // (2 * photo.width), 2)
    row = min(3 * (2 * top + height) // (2 * photo.height), 2)
    box = (left, top, left + width, top + height)
    image = photo.resize((out_width, out_height), Image.Resampling.BICUBIC, box=box)
    return image, _PLACES[row][column]


def _save(image: Image.Image, path: Path, turned: bool) -> None:
    """Save an image, as a camera held sideways would if ``turned``."""
    if not turned:
        image.save(path, quality=88)
        return
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, quality=88, exif=exif.tobytes())


def _make_crops(
    folder: Path, count: int, generator: random.Random, advance: Callable[[], None]
) -> list[Crop]:
    photos = [decode_image(photo_folder() / photo.file) for photo in PHOTOS]
    crops = []
    for number in range(count):
        which = number % len(PHOTOS)
        image, place = cut_photo(photos[which], generator)
        suffix = "png" if generator.random() < _SHARE_PNG else "jpg"
        name = f"{Path(PHOTOS[which].file).stem}-{number:04d}.{suffix}"
        turned = suffix == "jpg" and generator.random() < _SHARE_TURNED
        _save(image, folder / name, turned)
        brightness, color = measure(image)
        crops.append(
            Crop(
                name=name,
                photo=PHOTOS[which],
                place=place,
                width=image.width,
                height=image.height,
                brightness=brightness,
                color=color,
            )
        )
        advance()
    return crops


def _shape(crop: Crop) -> str:
    if crop.width > 1.15 * crop.height:
        return "wider than high"
    return "higher than wide" if crop.height > 1.15 * crop.width else "nearly square"


def _light(crop: Crop) -> str:
    names = ("dark", "rather dark", "rather bright", "bright")
    return names[min(crop.brightness // 64, 3)]


def _questions(crop: Crop) -> list[tuple[str, str]]:
    """All that can be asked about one crop."""
    return [
        ("What is on this image?", f"It shows {crop.photo.subject}."),
        ("Which part of the photograph is it?", f"It is cut out of the {crop.place}."),
        ("Is it bright?", f"It is {_light(crop)}, {crop.brightness} of 255 on average."),
        ("What color is it on average?", f"On average it is {crop.color}."),
        (
            "What shape is the image?",
            f"It is {_shape(crop)}, {crop.width} by {crop.height} pixels.",
        ),
        *crop.photo.details,
    ]


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": role, "value": text}
        for question, answer in pairs
        for role, text in (("human", question), ("gpt", answer))
    ]


def _one_image_sample(crop: Crop, generator: random.Random) -> dict[str, Any]:
    questions = _questions(crop)
    chosen = generator.sample(questions, generator.randint(1, len(questions)))
    chosen[0] = (f"<image>\n{chosen[0][0]}", chosen[0][1])
    return {"id": Path(crop.name).stem, "image": crop.name, "conversations": _turns(chosen)}


def _many_image_sample(crops: Sequence[Crop], generator: random.Random) -> dict[str, Any]:
    """A comparison of two to four images."""
    marks = "\n".join(f"Image {number}: <image>" for number in range(1, len(crops) + 1))
    brightest = max(range(len(crops)), key=lambda number: crops[number].brightness)
    largest = max(range(len(crops)), key=lambda number: crops[number].width * crops[number].height)
    subjects = " ".join(
        f"Image {number} shows {crop.photo.subject}." for number, crop in enumerate(crops, 1)
    )
    pairs = [
        ("What is on these images?", subjects),
        ("Which of them is the brightest?", f"Image {brightest + 1} is the brightest."),
        ("Which of them has the most pixels?", f"Image {largest + 1} has the most pixels."),
    ]
    chosen = generator.sample(pairs, generator.randint(1, len(pairs)))
    chosen[0] = (f"{marks}\n{chosen[0][0]}", chosen[0][1])
    name = "compare-" + "-".join(Path(crop.name).stem.rpartition("-")[2] for crop in crops)
    return {"id": name, "image": [crop.name for crop in crops], "conversations": _turns(chosen)}


def _image_samples(
    crops: Sequence[Crop], num_samples: int, generator: random.Random
) -> list[dict[str, Any]]:
    num_many = round(num_samples * _SHARE_WITH_SEVERAL_IMAGES)
    singles = [_one_image_sample(crop, generator) for crop in crops[: num_samples - num_many]]
    many = [
        _many_image_sample(generator.sample(crops, generator.randint(2, 4)), generator)
        for _ in range(num_samples - len(singles))
    ]
    return singles + many


def _readme(options: SampleDataOptions) -> str:
    origins = "\n".join(f"- `{photo.file}`: {photo.subject}. {photo.origin}." for photo in PHOTOS)
    return (
        "# Sample data\n\nMade by `scripts/make_sample_data.py` "
        f"(seed {options.seed}). The images are crops of photographs that ship inside "
        "scikit-image (`skimage/data`), scaled; their origins, as scikit-image documents them:\n\n"
        f"{origins}\n\nThe texts without images are from the documentation that ships with Python "
        "(Python Software Foundation License).\n"
    )


def make_sample_data(
    folder: str | Path,
    options: SampleDataOptions,
    advance: Callable[[], None] = lambda: None,
) -> SampleDataSummary:
    """Write ``samples.json``, ``images/``, ``tokenizer.json`` and ``README.md`` into ``folder``.

    Args:
        advance: Called after each of ``num_image_samples`` images, for a progress bar.

    Raises:
        DataError: scikit-image is not installed.
    """
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    crops = _make_crops(images, options.num_image_samples, generator, advance)
    with_images = _image_samples(crops, options.num_image_samples, generator)
    text_only = text_samples(options.num_text_samples, options.max_text_characters, generator)
    samples = with_images + text_only
    write_atomically(folder / "README.md", _readme(options))
    write_atomically(folder / "images" / "README.md", _readme(options))
    tokenizer = _train(samples, options.vocab_size, folder / "tokenizer.json")
    for sample in text_only:
        answer = sample["conversations"][-1]
        answer["value"] = _shorten(answer["value"], options.max_text_tokens, tokenizer)
    write_atomically(folder / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
    return SampleDataSummary(
        num_samples=len(samples),
        num_images=len(crops),
        num_with_several_images=sum(isinstance(sample["image"], list) for sample in with_images),
        num_text_only=len(text_only),
        vocab_size=tokenizer.vocab_size,
        image_bytes=sum((images / crop.name).stat().st_size for crop in crops),
    )


def _shorten(text: str, max_tokens: int, tokenizer: VlmTokenizer) -> str:
    while (num_tokens := len(tokenizer.encode_text(text))) > max_tokens:
        text = excerpt(text, len(text) * max_tokens // num_tokens)
    return text


def _train(samples: Sequence[dict[str, Any]], vocab_size: int, path: Path) -> VlmTokenizer:
    texts = [turn["value"] for sample in samples for turn in sample["conversations"]]
    return train_tokenizer(texts, vocab_size, path)
