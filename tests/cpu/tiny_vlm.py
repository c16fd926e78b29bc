"""A tiny vision-language model and a data set for it, with sequences of very different kinds.

About half of the sequences hold text alone, the others up to five images, so that microbatches of
two sequences come without any image, with few, and with many.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_data_set import sample_of

from megatron_dip.families.data.tokenizer import train_tokenizer

__all__ = ["make_tiny_data", "write_config"]

SEQUENCE_LENGTH = 96
_WORDS = (
    "the a small large red blue round house tree river bird stone cloud under over beside "
    "sees holds moves quickly slowly never always and then because while it they"
)
_NUM_IMAGES = 9


def make_tiny_data(folder: Path, *, num_samples: int = 240) -> None:
    """Write ``samples.json``, ``tokenizer.json`` and ``images/``; the same files every time."""
    images = folder / "images"
    images.mkdir(parents=True)
    random = np.random.default_rng(7)
    for number in range(_NUM_IMAGES):
        size = (12 + 6 * number, 60 - 5 * number, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(
            images / f"{number}.png"
        )
    samples = [_sample(number, random) for number in range(num_samples)]
    texts = [turn["value"] for sample in samples for turn in sample["conversations"]]
    train_tokenizer(texts, 320, folder / "tokenizer.json")
    (folder / "samples.json").write_text(json.dumps(samples))


def _sample(number: int, random: np.random.Generator) -> dict[str, Any]:
    """Nearly as long as a sequence, so that few of them share one."""
    num_images = 0 if number % 9 < 5 else int(random.integers(1, 6))
    names = [f"{image}.png" for image in random.integers(0, _NUM_IMAGES, num_images)]
    num_words = int(random.integers(16, 25)) if not names else int(random.integers(3, 8))
    answer = " ".join(random.choice(_WORDS.split(), num_words))
    return sample_of(f"s{number}", *names, answer=f"{answer}.")


def write_config(
    path: Path,
    data: Path,
    *,
    num_ranks: int,
    num_segments: int | Mapping[str, int] = 1,
    sub_microbatch_tokens: tuple[int | None, int | None] = (None, None),
    layers: dict[str, Sequence[Sequence[int]]] | None = None,
    planner: str = "dual_queue",
    evaluations: int | None = None,
    planning: Mapping[str, float] | None = None,
    feedback: bool = True,
    experts: Mapping[str, int] | None = None,
    hardware_queues: str = "auto",
) -> Path:
    """A configuration file.

    Args:
        data: What :func:`make_tiny_data` has filled.
        num_segments: Of both modules, or of each by its name.
        sub_microbatch_tokens: Of vision and language; None leaves microbatches whole.
        layers: Per module, segment and rank; cut evenly where not given.
        planning: As in a configuration file.
        experts: Of the language module, as in a configuration file.
        hardware_queues: As in a configuration file.
        feedback: Whether costs follow what is measured, so that plans differ from run to run.
    """
    segments = num_segments
    if isinstance(segments, int):
        segments = {"vision": segments, "language": segments}
    modules = {
        name: {"num_segments": segments[name]}
        | ({"sub_microbatch_tokens": tokens} if tokens else {})
        | ({"layers": [list(segment) for segment in layers[name]]} if layers else {})
        for name, tokens in zip(("vision", "language"), sub_microbatch_tokens, strict=True)
    }
    config = {
        "model": {
            "vision": {
                "num_layers": 8,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 2,
                "patch_size": 4,
                "position_grid": 8,
            },
            "language": {
                "num_layers": 8,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": 384,
                "seq_length": SEQUENCE_LENGTH,
                **({"experts": dict(experts)} if experts else {}),
            },
        },
        "schedule": {
            "num_ranks": num_ranks,
            "planner": planner,
            **({} if evaluations is None else {"evaluations": evaluations}),
            "hardware_queues": hardware_queues,
            "modules": modules,
            "costs": {"feedback": feedback},
        },
        "planning": dict(planning or {}),
        "data": {
            "path": str(data / "samples.json"),
            "image_folder": str(data / "images"),
            "tokenizer": str(data / "tokenizer.json"),
            "min_image_tokens": 2,
            "max_image_tokens": 12,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path
