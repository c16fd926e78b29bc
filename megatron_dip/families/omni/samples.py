"""Samples of questions about images and sounds, out of a JSON list.

One is ``{"id": "7", "image": "cat.png", "audio": "meow.wav", "question": "...", "answer": "..."}``;
``image`` and ``audio`` may be absent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dip.errors import DataError
from megatron_dip.families.data.fields import optional_file_name, text_of, unread_keys
from megatron_dip.families.data.samples import sample_fields

__all__ = ["OmniSample", "parse_omni_sample", "parse_omni_samples"]

_KEYS = ("id", "image", "audio", "question", "answer")


@dataclass(frozen=True, kw_only=True)
class OmniSample:
    """One question with its answer."""

    name: str
    """How messages call it."""
    image: str | None
    audio: str | None
    question: str
    answer: str
    unread: tuple[str, ...]
    """Keys that say nothing that would be trained."""


def parse_omni_sample(raw: Any, number: int) -> OmniSample:
    """The checked form of one raw sample.

    Raises:
        DataError: A field is missing or of the wrong kind, or a key says what would not be read.
    """
    name, fields = sample_fields(raw, number)
    return OmniSample(
        name=name,
        unread=unread_keys(fields, _KEYS, name),
        image=optional_file_name(fields, "image", name),
        audio=optional_file_name(fields, "audio", name),
        question=text_of(fields, "question", name),
        answer=text_of(fields, "answer", name),
    )


def parse_omni_samples(raw: Sequence[Any]) -> list[OmniSample | DataError]:
    """All samples of a file, a bad one as its error."""
    parsed: list[OmniSample | DataError] = []
    for number, one in enumerate(raw):
        try:
            parsed.append(parse_omni_sample(one, number))
        except DataError as error:
            parsed.append(error)
    return parsed
