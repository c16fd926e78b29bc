"""A tiny LaVIN and a data set for it: problems in the layout of ScienceQA."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from megatron_dip.families.data.tokenizer import train_tokenizer

__all__ = ["make_tiny_scienceqa", "raw_problem", "write_lavin_config"]

_WORDS = ("why", "does", "the", "moon", "turn", "around", "a", "stone", "which", "is", "warm")
SEQUENCE_LENGTH = 176


def raw_problem(number: int, *, image: bool, random: np.random.Generator) -> dict[str, Any]:
    """A problem as the file has it."""
    words = [str(word) for word in random.choice(_WORDS, int(random.integers(3, 9)))]
    solution = " ".join(str(word) for word in random.choice(_WORDS, int(random.integers(1, 12))))
    return {
        "question": " ".join(words),
        "choices": ["a stone", "the moon", "never"][: 2 + number % 2],
        "answer": number % 2,
        "hint": "" if number % 3 else words[0],
        "image": "image.png" if image else None,
        "lecture": "",
        "solution": f"{solution}.",
        "subject": "natural science",
        "grade": f"grade{1 + number % 12}",
    }


def make_tiny_scienceqa(folder: Path, *, num_problems: int = 80) -> None:
    """``problems.json``, ``pid_splits.json``, images and tokenizer; the same files every time."""
    random = np.random.default_rng(5)
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(num_problems):
        split = "val" if number % 8 == 7 else "train"
        has_image = number % 5 in (0, 3)
        problems[str(number)] = raw_problem(number, image=has_image, random=random)
        splits[split].append(str(number))
        if has_image:
            path = folder / "images" / split / str(number) / "image.png"
            path.parent.mkdir(parents=True)
            size = (20 + number, 90 - number, 3)
            Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(path)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    texts = [f"{p['question']} {p['solution']} The answer is" for p in problems.values()]
    train_tokenizer(texts, 320, folder / "tokenizer.json")


def write_lavin_config(
    path: Path,
    data: Path,
    *,
    num_ranks: int = 2,
    num_segments: int = 1,
    sub_microbatch_tokens: tuple[int | None, int | None] = (None, None),
    adapter: Mapping[str, Any] | None = None,
    **data_fields: Any,
) -> Path:
    """A configuration file over what :func:`make_tiny_scienceqa` has filled."""
    modules = {
        name: {"num_segments": num_segments} | ({"sub_microbatch_tokens": tokens} if tokens else {})
        for name, tokens in zip(("vision", "language"), sub_microbatch_tokens, strict=True)
    }
    config = {
        "family": "lavin",
        "model": {
            "vision": {
                "num_layers": 4,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 2,
                "patch_size": 14,
                "image_size": 42,
                "feature_layers": [1, 3, 4],
            },
            "language": {
                "num_layers": 4,
                "hidden_size": 48,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 4,
                "vocab_size": 384,
                "seq_length": SEQUENCE_LENGTH,
            },
            "adapter": {"dropout": 0.0, "neck_size": 16} | dict(adapter or {}),
        },
        "schedule": {"num_ranks": num_ranks, "modules": modules},
        "data": {
            "path": str(data / "problems.json"),
            "image_folder": str(data / "images"),
            "tokenizer": str(data / "tokenizer.json"),
        }
        | data_fields,
    }
    path.write_text(yaml.safe_dump(config))
    return path
