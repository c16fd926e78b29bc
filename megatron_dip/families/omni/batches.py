"""Microbatches of questions about images and sounds.

Items: an image is an item of ``vision``, an audio clip one of ``audio``, a sequence one of
``language``; images and clips are numbered through the microbatch each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.families.omni.audio import TOKENS_PER_ROW
from megatron_dip.families.packed.batches import EncoderBatch, Movable, check_items
from megatron_dip.families.vlm.batches import (
    LanguageBatch,
    PackedSequence,
    VisionBatch,
    VlmMicrobatch,
)

__all__ = [
    "AudioBatch",
    "AudioData",
    "OmniMicrobatch",
    "OmniSequence",
    "WholeOmni",
    "num_sound_rows",
    "sound_item",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioData:
    """One audio clip."""

    num_tokens: int
    """Of the encoder; a multiple of four."""
    mels: Tensor | None
    """``[2 * num_tokens, mels]`` float32; None where this rank needs none."""

    @property
    def num_rows(self) -> int:
        """Rows of features for the language module."""
        return num_sound_rows(self.num_tokens)


def num_sound_rows(num_tokens: int) -> int:
    """Rows of the language module that stand for a clip of ``num_tokens``."""
    return num_tokens // TOKENS_PER_ROW


def sound_item(num_tokens: int) -> ItemSize:
    """The size of a clip, as an item of the audio module."""
    return ItemSize(
        tokens=num_tokens, spans=(num_tokens,), output_tokens=num_sound_rows(num_tokens)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class OmniSequence(PackedSequence):
    """One sample; the rows of its images come first, those of its audio next."""

    audios: tuple[AudioData, ...]

    @property
    def num_media_rows(self) -> int:
        """Rows of ``tokens`` that features replace."""
        return super().num_media_rows + sum(audio.num_rows for audio in self.audios)

    def without_media(self) -> Self:
        """The same without pixels and sounds."""
        unheard = tuple(replace(audio, mels=None) for audio in self.audios)
        return replace(super().without_media(), audios=unheard)


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioBatch(EncoderBatch):
    """Some audio clips of a microbatch."""

    in_weights_dtype = frozenset({"mels"})

    mels: Tensor | None
    """``[2 N, mels]`` float32, clip after clip; None where this rank reads no files."""
    span_lengths: tuple[int, ...]
    """Tokens of each clip; attention stays inside a clip."""
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeOmni(Movable):
    """A microbatch for Megatron's own schedule: sequences of one fixed length."""

    vision: VisionBatch
    audio: AudioBatch
    language: LanguageBatch

    @property
    def loss_mask(self) -> Tensor:
        """``[sequences * seq_length]`` float32."""
        return self.language.loss_mask


@dataclass(frozen=True, kw_only=True, eq=False)
class OmniMicrobatch(VlmMicrobatch):
    """The sequences of one microbatch, with what they see and hear."""

    sequences: tuple[OmniSequence, ...]

    @property
    def audios(self) -> tuple[AudioData, ...]:
        """All clips; their places are their item numbers."""
        return tuple(audio for sequence in self.sequences for audio in sequence.audios)

    def heard(self, sequence: int) -> tuple[int, ...]:
        """The numbers of the clips of a sequence."""
        ends = list(accumulate(len(one.audios) for one in self.sequences))
        return tuple(range(ends[sequence] - len(self.sequences[sequence].audios), ends[sequence]))

    def metadata(self) -> ItemSizes:
        """As for images, and tokens of every clip."""
        plain = super().metadata()
        return {
            "vision": plain["vision"],
            "audio": [sound_item(audio.num_tokens) for audio in self.audios],
            "language": [
                replace(size, needs={**size.needs, "audio": self.heard(number)})
                for number, size in enumerate(plain["language"])
            ],
        }

    def sub_batch(self, module: str, items: Sequence[int]) -> Any:
        """See :class:`Microbatch`."""
        if module != "audio":
            return super().sub_batch(module, items)
        audios = self.audios
        check_items(module, items, {"audio": len(audios)})
        mels = [audio.mels for item in items if (audio := audios[item]).mels is not None]
        assert len(mels) in (0, len(items)), "a rank reads all of its files or none"
        return AudioBatch(
            mels=torch.cat([mel for mel in mels if mel is not None]) if mels else None,
            span_lengths=tuple(audios[item].num_tokens for item in items),
            items=tuple(items),
        )

    def whole(self, seq_length: int) -> WholeOmni:  # type: ignore[override]
        """See :class:`Microbatch`; every sequence is padded to ``seq_length``."""
        return WholeOmni(
            vision=self.sub_batch("vision", range(len(self.images))),
            audio=self.sub_batch("audio", range(len(self.audios))),
            language=self.padded(seq_length),
        )

    def _one_sequence(self, item: int) -> LanguageBatch:
        media = [("vision", image) for image in self.needs[item]]
        media += [("audio", audio) for audio in self.heard(item)]
        plain = super()._one_sequence(item)
        heard = tuple(audio.num_rows for audio in self.sequences[item].audios)
        rows = (*plain.upstream_rows, *heard)
        return replace(plain, media=tuple(media), upstream_rows=rows)

    def _join(self, parts: Sequence[LanguageBatch]) -> LanguageBatch:
        media = tuple(one for part in parts for one in part.media or ())
        return replace(super()._join(parts), media=media)
