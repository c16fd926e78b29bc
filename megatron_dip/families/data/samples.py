"""Samples in LLaVA's format, and how a conversation becomes tokens.

The data set is a JSON list of::

    {"id": "cat-3", "image": "cat-3.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A cat."}]}

``image`` is a name, a list of names, or absent; each ``<image>`` in a human turn stands for the
next of them.  Loss is taken on the turns of ``gpt`` and the end of turn after them.  Turns stand in
any order and are written as they come; none may be blank.  Nothing is cut off: a sample that does
not fit is a bad one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError, shown
from megatron_dip.families.data.conversation import EncodedText, Part, TurnParts, encode_turns
from megatron_dip.families.data.fields import check_object, file_name, text_of, unread_keys
from megatron_dip.families.data.tokenizer import VlmTokenizer
from megatron_dip.reading import read_json
from megatron_dip.text_form import IMAGE, SYSTEM_ROLE

__all__ = [
    "EncodedText",
    "Sample",
    "Turn",
    "check_length",
    "encode_text",
    "parse_sample",
    "read_samples",
    "sample_fields",
    "sample_name",
]

_ROLES = ("human", "gpt", SYSTEM_ROLE)
_KEYS = ("id", "image", "conversations")
_TURN_KEYS = ("from", "value")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """``human``, ``gpt``, or ``system`` where the tokenizer's form has it."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation with the names of its images, in the order of their marks."""

    name: str
    """How messages call it: its id, and its place in the file."""
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()
    """Keys that say nothing that would be trained."""


def read_samples(path: str | Path) -> list[Any]:
    """The raw samples of a file, none of them checked yet.

    Raises:
        DataError: The file cannot be read, is not JSON, or holds no list of samples.
    """
    raw = read_json(path, DataError, allow_repeated_keys=True)
    if not isinstance(raw, list) or not raw:
        given = "an empty list" if raw == [] else type(raw).__name__
        raise DataError(f"{path}: expected a JSON list of samples, found {given}")
    return raw


def sample_name(raw: Any, number: int) -> str:
    """How messages call sample ``number`` (its place in the file, from 0)."""
    given = raw.get("id") if isinstance(raw, Mapping) else None
    return (
        f"sample {shown(given)} (number {number})"
        if given is not None
        else f"sample number {number}"
    )


def sample_fields(raw: Any, number: int) -> tuple[str, Mapping[str, Any]]:
    """The name and the fields of a raw sample of any family.

    Ids are for messages alone: several samples may have the same.

    Raises:
        DataError: It is no object, or its id is neither a text nor a whole number.
    """
    name = sample_name(raw, number)
    fields = check_object(raw, name)
    given = fields.get("id")
    if isinstance(given, bool) or not isinstance(given, (str, int, type(None))):
        raise DataError(f"{name}: field 'id' is {shown(given)}; expected a text or a whole number")
    return name, fields


def parse_sample(raw: Any, number: int) -> Sample:
    """The checked form of one raw sample.

    Raises:
        DataError: A field is missing or of the wrong kind, a key says what would not be read, a
            role is unknown, nothing is to be learned, or the number of ``<image>`` marks is not
            that of the images.
    """
    name, fields = sample_fields(raw, number)
    if fields.get("id") is None:
        raise DataError(f"{name}: field 'id' is missing; give every sample a text or a number")
    unread = unread_keys(fields, _KEYS, name)
    turns, unread_of_turns = _parse_turns(fields, name)
    sample = Sample(
        name=name,
        images=_parse_images(fields, name),
        turns=turns,
        unread=(*unread, *unread_of_turns),
    )
    num_marks = sum(turn.text.count(IMAGE) for turn in sample.turns if turn.role == "human")
    if num_marks != len(sample.images):
        raise DataError(
            f"{name}: {num_marks} {IMAGE} marks in the human turns, but {len(sample.images)} "
            f"images; write one mark for each image"
        )
    return sample


def _parse_images(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    images = raw.get("image")
    if images is None:
        return ()
    if not isinstance(images, (str, list)):
        raise DataError(
            f"{name}: field 'image' is {shown(images)}; expected a name or a list of names"
        )
    names = [images] if isinstance(images, str) else images
    return tuple(file_name(image, "image", name) for image in names)


def _parse_turns(raw: Mapping[str, Any], name: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns, and their keys that are not read."""
    conversation = raw.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        found = "missing or empty" if conversation in (None, []) else shown(conversation)
        raise DataError(
            f"{name}: field 'conversations' is {found}; expected a list of turns "
            f'{{"from": ..., "value": ...}}'
        )
    turns: list[Turn] = []
    unread: list[str] = []
    for number, one in enumerate(conversation):
        place = f"{name}: turn {number}"
        turn = check_object(one, place)
        role, text = text_of(turn, "from", place), text_of(turn, "value", place)
        if role not in _ROLES:
            raise DataError(f"{place}: unknown role {shown(role)}; expected 'human' or 'gpt'")
        unread += unread_keys(turn, _TURN_KEYS, place, in_turn=True)
        turns.append(Turn(role=role, text=text))
    if all(turn.role != "gpt" for turn in turns):
        raise DataError(f"{name}: has no turn of 'gpt', so that nothing is to be learned from it")
    return tuple(turns), tuple(unread)


def encode_text(sample: Sample, tokenizer: VlmTokenizer) -> EncodedText:
    """The tokens of a sample, each image a single token (see ``EncodedText.expand``).

    Only marks in human turns are images; the same characters in an answer are text.

    Raises:
        DataError: The tokenizer's form does not have this order of turns, or a role.
    """
    turns = [TurnParts(turn.role, _parts(turn)) for turn in sample.turns]
    return encode_turns(turns, tokenizer, sample.name)


def _parts(turn: Turn) -> tuple[Part, ...]:
    if turn.role != "human":
        return (Part("text", turn.text),)
    parts: list[Part] = []
    for number, text in enumerate(turn.text.split(IMAGE)):
        parts += [Part("image")] if number else []
        parts += [Part("text", text)] if text else []
    return tuple(parts)


def check_length(name: str, num_text_tokens: int, num_image_tokens: int, seq_length: int) -> None:
    """
    Raises:
        DataError: The sample does not fit into a sequence of ``seq_length`` tokens.
    """
    length = num_text_tokens + num_image_tokens
    if length > seq_length:
        raise DataError(
            f"{name}: {length} tokens ({num_text_tokens} of text, {num_image_tokens} of images), "
            f"longer than the sequence length {seq_length}; shorten it, raise seq_length, lower "
            f"max_image_tokens, or skip bad samples"
        )
