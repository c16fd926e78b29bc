"""A small real data set in the layout of ScienceQA, made without a network.

Half of the problems are about crops of the photographs that ship inside scikit-image (subject,
part, brightness, mean color as measured), the others about the documentation that ships with
Python (which part of it a text is from).  The same arguments give the same files.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.tokenizer import train_tokenizer
from megatron_dip.families.lavin.scienceqa import answer_text, parse_problem, prompt_text
from megatron_dip.families.sample_data.image_text import COLORS, cut_photo, measure
from megatron_dip.families.sample_data.photos import PHOTOS, Photo, photo_folder
from megatron_dip.families.sample_data.texts import excerpt, python_texts
from megatron_dip.files import write_atomically

__all__ = ["QuestionOptions", "make_sample_questions"]

_LIGHTS = ("dark", "rather dark", "rather bright", "bright")
_SPLITS = (("train", 0.8), ("val", 0.1), ("test", 0.1))
_MAX_CHOICES = 5


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """How much is made."""

    num_problems: int = 300
    vocab_size: int = 2000
    seed: int = 1234
    max_hint_characters: int = 500
    image_share: float = 0.5


def make_sample_questions(
    folder: str | Path, options: QuestionOptions, advance: Callable[[], None] = lambda: None
) -> dict[str, list[str]]:
    """Write ``problems.json``, ``pid_splits.json``, ``images/`` and ``tokenizer.json``.

    Args:
        advance: Called after each problem, for a progress bar.

    Returns:
        The qids by split, as ``pid_splits.json`` has them.

    Raises:
        DataError: scikit-image is not installed.
    """
    folder = Path(folder)
    generator = random.Random(options.seed)
    photos = [(photo, decode_image(photo_folder() / photo.file)) for photo in PHOTOS]
    texts = python_texts()
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {name: [] for name, _ in _SPLITS}
    for number in range(options.num_problems):
        qid = str(number + 1)
        (split,) = generator.choices([n for n, _ in _SPLITS], [share for _, share in _SPLITS])
        if generator.random() < options.image_share:
            photo, pixels = generator.choice(photos)
            path = folder / "images" / split / qid / "image.png"
            problem = _image_problem(photo, pixels, path, generator)
        else:
            problem = _text_problem(texts, options.max_hint_characters, generator)
        problems[qid] = {**problem, "split": split}
        splits[split].append(qid)
        advance()
    write_atomically(folder / "problems.json", json.dumps(problems, indent=1))
    write_atomically(folder / "pid_splits.json", json.dumps(splits))
    spoken = []
    for qid, raw in problems.items():
        parsed = parse_problem(qid, raw, raw["split"])
        spoken += ["Image: N/A", prompt_text(parsed), answer_text(parsed)]
    train_tokenizer(spoken, options.vocab_size, folder / "tokenizer.json")
    return splits


def _image_problem(
    photo: Photo, pixels: Image.Image, path: Path, generator: random.Random
) -> dict[str, Any]:
    crop, place = cut_photo(pixels, generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    crop.save(path)
    brightness, color = measure(crop)
    light = _LIGHTS[min(brightness // 64, 3)]
    shown = f"The image shows {photo.subject}, cut out of the {place} of a photograph."
    questions = [
        ("What is on this image?", photo.subject, [other.subject for other in PHOTOS], shown),
        (
            "How bright is this image?",
            light,
            list(_LIGHTS),
            f"Its mean grey value is {brightness} of 255.",
        ),
        (
            "Which color is nearest to the mean color of this image?",
            color,
            list(COLORS),
            f"{shown} Its mean color is nearest to {color}.",
        ),
    ]
    question, answer, others, solution = generator.choice(questions)
    return _problem(
        question, answer, others, generator, solution=solution, image=path.name, grade=3
    )


def _text_problem(
    texts: Sequence[tuple[str, str]], max_characters: int, generator: random.Random
) -> dict[str, Any]:
    subject, text = generator.choice(texts)
    length = round(60 * (max_characters / 60) ** generator.random())
    others = [other for other, _ in generator.sample(list(texts), 8)]
    return _problem(
        "Which part of Python's documentation is this text from?",
        subject,
        others,
        generator,
        hint=excerpt(text, length),
        solution=f"It documents {subject}.",
        grade=9,
    )


def _problem(
    question: str,
    answer: str,
    others: Sequence[str],
    generator: random.Random,
    *,
    solution: str,
    grade: int,
    hint: str = "",
    image: str | None = None,
) -> dict[str, Any]:
    wrong = sorted({other for other in others if other != answer})
    choices = [answer, *generator.sample(wrong, min(len(wrong), generator.randint(1, 4)))]
    assert len(choices) <= _MAX_CHOICES
    generator.shuffle(choices)
    return {
        "question": question,
        "choices": choices,
        "answer": choices.index(answer),
        "hint": hint,
        "image": image,
        "lecture": "",
        "solution": solution,
        "subject": "natural science" if image else "language science",
        "grade": f"grade{grade}",
    }
