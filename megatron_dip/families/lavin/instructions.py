"""What LaVIN is tuned on: an instruction, perhaps with an image, and an answer to be learned.

An instruction becomes the rows (T of them, its modality row not counted)::

    <bos> "Image: " [F image rows] instruction answer <eos>       with an image
    <bos> "Image: N/A" instruction answer <eos>                   without

of which the answer and the end are learned.  Each part is encoded by itself.  What does not fit is
cut off at the end, as published; where nothing that is learned would be left, that is an error.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_dip.errors import DataError
from megatron_dip.families.data.tokenizer import VlmTokenizer

__all__ = ["EncodedInstruction", "Instruction", "encode_instruction"]

_WITH_IMAGE, _WITHOUT_IMAGE = "Image: ", "Image: N/A"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One sample."""

    name: str
    """How messages call it."""
    prompt: str
    answer: str
    image: Path | None
    """Relative to the folder of the images."""
    unread: tuple[str, ...] = ()
    """Keys that say nothing that would be trained."""


@dataclass(frozen=True, kw_only=True)
class EncodedInstruction:
    """The rows of a sample."""

    tokens: tuple[int, ...]
    """0 where a row stands for an image."""
    learned: tuple[bool, ...]
    """Per row: whether the model learns to say its token."""
    image_rows: tuple[int, ...]

    @property
    def num_learned(self) -> int:
        return sum(self.learned)


def encode_instruction(
    sample: Instruction, tokenizer: VlmTokenizer, *, num_features: int, max_rows: int
) -> EncodedInstruction:
    """The rows of ``sample``, at most ``max_rows``.

    Args:
        num_features: Rows that an image stands for.

    Raises:
        DataError: No row of the answer would be left.
    """
    tokens = tokenizer.begin()
    image_rows: range = range(0)
    if sample.image is None:
        tokens += tokenizer.encode_text(_WITHOUT_IMAGE)
    else:
        tokens += tokenizer.encode_text(_WITH_IMAGE)
        image_rows = range(len(tokens), len(tokens) + num_features)
        tokens += [0] * num_features
    tokens += tokenizer.encode_text(sample.prompt)
    start = len(tokens)
    if start >= max_rows:
        raise DataError(
            f"{sample.name}: the instruction alone has {start} rows, and a sequence has room for "
            f"{max_rows}, so that nothing of the answer is left to learn (shorten it, raise "
            f"model.language.seq_length, or skip bad samples)"
        )
    tokens += [*tokenizer.encode_text(sample.answer), *tokenizer.end()]
    tokens = tokens[:max_rows]
    return EncodedInstruction(
        tokens=tuple(tokens),
        learned=(False,) * start + (True,) * (len(tokens) - start),
        image_rows=tuple(image_rows),
    )
