"""Chat data: a JSON file ``{"all": [{"instruction": ..., "answer": ..., "image": ...}]}``.

Every turn of a conversation is a sample of its own.  ``image`` is null or a file; where
``image_source`` is given, it names the folder of the image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dip.data.lavin.instructions import Instruction
from megatron_dip.errors import DataError
from megatron_dip.reading import read_json

__all__ = ["parse_turn", "read_chat"]


def read_chat(path: str | Path) -> tuple[tuple[Instruction, ...], tuple[str, ...]]:
    """The samples of a file, and why the others of it cannot be used; no image is looked at.

    Raises:
        DataError: The file cannot be read or is not of this form.
    """
    raw = read_json(path, DataError)
    turns = raw.get("all") if isinstance(raw, Mapping) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f'{path}: expected {{"all": [...]}} with at least one sample')
    good: list[Instruction] = []
    errors: list[str] = []
    for number, turn in enumerate(turns):
        try:
            good.append(parse_turn(turn, number))
        except DataError as error:
            errors.append(str(error))
    return tuple(good), tuple(errors)


def parse_turn(raw: Any, number: int) -> Instruction:
    """The checked form of one sample.

    Raises:
        DataError: A field is missing or of the wrong kind.
    """
    name = f"sample number {number}"
    if not isinstance(raw, Mapping):
        raise DataError(f"{name}: expected an object, found {type(raw).__name__}")
    if raw.get("qid") is not None:
        name = f"sample {raw['qid']!r} (number {number})"
    for field in ("instruction", "answer"):
        if not isinstance(raw.get(field), str):
            raise DataError(f"{name}: field {field!r} is missing or not a text")
    image, source = raw.get("image"), raw.get("image_source")
    if image is not None and not (isinstance(image, str) and image):
        raise DataError(f"{name}: field 'image' is {image!r}; expected null or a file")
    if source is not None and not isinstance(source, str):
        raise DataError(f"{name}: field 'image_source' is {source!r}; expected null or a folder")
    return Instruction(
        name=name,
        prompt=f"Instruction: {raw['instruction']} \nResponse:",
        answer=raw["answer"],
        image=None if image is None else Path(source or "") / image,
    )
