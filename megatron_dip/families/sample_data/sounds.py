"""A small data set of images with sounds, made without a network.

Sounds are synthesised with SciPy (steady tones, sweeps up and down, clicks, noise) at several
pitches and lengths and written as WAV files; images are parts of the photographs that ship inside
scikit-image.  Questions ask what is to be seen, to be heard, or both.  The same arguments give the
same files.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import DataError
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.tokenizer import train_tokenizer
from megatron_dip.families.sample_data.photos import PHOTOS, photo_folder
from megatron_dip.files import write_atomically

__all__ = ["SampleSoundOptions", "make_sample_sounds", "synthesise"]

_KINDS = ("a steady tone", "a rising sweep", "a falling sweep", "clicks", "noise")
_PITCHES = {"low": 220.0, "middle": 660.0, "high": 1980.0}


@dataclass(frozen=True, kw_only=True)
class SampleSoundOptions:
    """How much is made."""

    num_samples: int = 160
    rate: int = 16000
    lengths_s: tuple[float, ...] = (0.3, 0.6, 1.2, 2.0)
    side: int = 96
    """Longest side of an image in pixels."""
    vocab_size: int = 500
    seed: int = 1234


def synthesise(kind: str, pitch: float, length_s: float, rate: int, seed: int) -> NDArray[np.int16]:
    """Samples of one sound.

    Raises:
        DataError: SciPy is not installed.
    """
    try:
        signal = import_module("scipy.signal")
    except ImportError as error:
        raise DataError("SciPy is not installed; install megatron-dip[data]") from error
    times = np.arange(round(length_s * rate)) / rate
    if kind == "noise":
        found = 0.3 * np.random.default_rng(seed).standard_normal(len(times))
    elif kind == "clicks":
        found = (signal.square(2 * np.pi * 8 * times, duty=0.02) + 1) / 2
        found *= np.sin(2 * np.pi * pitch * times)
    else:
        ends = {"a rising sweep": (0.5, 2.0), "a falling sweep": (2.0, 0.5)}.get(kind, (1.0, 1.0))
        found = signal.chirp(times, ends[0] * pitch, max(length_s, 1e-3), ends[1] * pitch)
    return (0.5 * 2**15 * np.clip(found, -1.0, 1.0)).astype(np.int16)


def make_sample_sounds(
    folder: str | Path, options: SampleSoundOptions, advance: Callable[[], None] = lambda: None
) -> None:
    """Write ``samples.json``, ``media/`` and ``tokenizer.json`` into ``folder``.

    Raises:
        DataError: scikit-image or SciPy is not installed.
    """
    folder = Path(folder)
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    samples = []
    for number in range(options.num_samples):
        samples.append(_sample(number, media, options, generator))
        advance()
    texts = [sample[field] for sample in samples for field in ("question", "answer")]
    train_tokenizer(texts, options.vocab_size, folder / "tokenizer.json")
    write_atomically(folder / "samples.json", json.dumps(samples, indent=1))


def _sample(
    number: int, media: Path, options: SampleSoundOptions, generator: random.Random
) -> dict[str, Any]:
    wavfile = import_module("scipy.io.wavfile")
    # A third sees and hears, the others do one of both, and some neither.
    sees, hears = generator.random() < 0.6, generator.random() < 0.6
    sample: dict[str, Any] = {"id": str(number)}
    seen = heard = ""
    if sees:
        photo = generator.choice(PHOTOS)
        image = decode_image(photo_folder() / photo.file)
        image.thumbnail((options.side, generator.randint(options.side // 2, options.side)))
        sample["image"] = f"{number:04d}.png"
        image.save(media / sample["image"])
        seen = f"It shows {photo.subject}."
    if hears:
        kind, (name, pitch) = generator.choice(_KINDS), generator.choice(sorted(_PITCHES.items()))
        length = generator.choice(options.lengths_s)
        sample["audio"] = f"{number:04d}.wav"
        samples = synthesise(kind, pitch, length, options.rate, number)
        wavfile.write(media / sample["audio"], options.rate, samples)
        heard = f"It is {kind}, {name}, {length} seconds long."
    questions = {
        (True, True): "What is to be seen and heard?",
        (True, False): "What is on the image?",
        (False, True): "What is to be heard?",
        (False, False): "Is anything to be seen or heard?",
    }
    answer = f"{seen} {heard}".strip() or "There is neither an image nor a sound."
    return sample | {"question": questions[sees, hears], "answer": answer}
