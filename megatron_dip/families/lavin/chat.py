"""Chat data: a JSON file ``{"all": [{"instruction": ..., "answer": ..., "image": ...}]}``.

Every turn of a conversation is a sample of its own.  ``image`` is null or a file; where
``image_source`` is given, it names the folder of the image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError, shown
from megatron_dip.families.data.fields import check_object, optional_file_name, text_of, unread_keys
from megatron_dip.families.lavin.instructions import Instruction
from megatron_dip.reading import read_json

__all__ = ["parse_turn", "read_chat"]

_KEYS = ("qid", "instruction", "answer", "image", "image_source")


def read_chat(path: str | Path) -> tuple[tuple[Instruction, ...], tuple[str, ...]]:
    """The samples of a file, and why the others of it cannot be used; no image is looked at.

    Raises:
        DataError: The file cannot be read or is not of this form.
    """
    raw = read_json(path, DataError, allow_repeated_keys=True)
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
    fields = check_object(raw, name)
    if fields.get("qid") is not None:
        name = f"sample {shown(fields['qid'])} (number {number})"
    unread = unread_keys(fields, _KEYS, name)
    image = optional_file_name(fields, "image", name)
    folder = optional_file_name(fields, "image_source", name) if fields.get("image_source") else ""
    return Instruction(
        name=name,
        prompt=f"Instruction: {text_of(fields, 'instruction', name)} \nResponse:",
        answer=text_of(fields, "answer", name),
        image=None if image is None else Path(folder or "") / image,
        unread=unread,
    )
