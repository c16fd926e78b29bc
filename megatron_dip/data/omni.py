"""Questions about images and sounds: samples, their index, and microbatches of three modules.

The data set is a JSON list of ``{"id": "7", "image": "cat.png", "audio": "meow.wav",
"question": "...", "answer": "..."}``; ``image`` and ``audio`` may be absent.  A sample is one
sequence: the rows of the image and of the audio, the question and the answer, which is learned.

Items: an image is an item of ``vision``, an audio clip one of ``audio``, a sequence one of
``language``; images and clips are numbered through the microbatch each.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.data.audio import log_mel, num_audio_tokens, read_wav, read_wav_length
from megatron_dip.data.batches import check_items
from megatron_dip.data.files import write_atomically
from megatron_dip.data.images import (
    NUM_CHANNELS,
    PATCHES_PER_TOKEN,
    ImageLimits,
    choose_grid,
    decode_image,
    image_patches,
    num_image_tokens,
)
from megatron_dip.data.index import usable_samples
from megatron_dip.data.microbatch import (
    ImageData,
    LanguageBatch,
    PackedSequence,
    VisionBatch,
    VlmMicrobatch,
)
from megatron_dip.data.samples import check_length, read_samples, sample_name
from megatron_dip.data.tokenizer import VlmTokenizer, load_tokenizer
from megatron_dip.errors import DataError
from megatron_dip.forms import read_json

__all__ = [
    "AudioBatch",
    "AudioData",
    "OmniDataset",
    "OmniIndex",
    "OmniMicrobatch",
    "OmniSequence",
    "OmniSettings",
    "WholeOmni",
    "build_omni_index",
    "load_omni_index",
]

_FORMAT, _VERSION = "megatron-dip/omni-index", 1


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
        return self.num_tokens // PATCHES_PER_TOKEN


@dataclass(frozen=True, kw_only=True, eq=False)
class OmniSequence(PackedSequence):
    """One sample; the rows of its images come first, those of its audio next."""

    audios: tuple[AudioData, ...]

    @property
    def num_media_rows(self) -> int:
        """Rows of ``tokens`` that features replace."""
        return super().num_media_rows + sum(audio.num_rows for audio in self.audios)


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioBatch:
    """Some audio clips of a microbatch."""

    mels: Tensor | None
    """``[2 N, mels]`` float32, clip after clip; None where this rank reads no files."""
    span_lengths: tuple[int, ...]
    """Tokens of each clip; attention stays inside a clip."""
    items: tuple[int, ...]

    @property
    def upstream_items(self) -> tuple[tuple[str, int], ...]:
        """Nothing is upstream of the audio encoder."""
        return ()

    def to(self, device: torch.device | str) -> "AudioBatch":
        """The same on another device."""
        return self if self.mels is None else replace(self, mels=self.mels.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeOmni:
    """A microbatch for Megatron's own schedule: sequences of one fixed length."""

    vision: VisionBatch
    audio: AudioBatch
    language: LanguageBatch

    @property
    def loss_mask(self) -> Tensor:
        """``[sequences * seq_length]`` float32."""
        return self.language.loss_mask

    def to(self, device: torch.device | str) -> "WholeOmni":
        """The same on another device."""
        return WholeOmni(
            vision=self.vision.to(device),
            audio=self.audio.to(device),
            language=self.language.to(device),
        )


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
            "audio": [
                ItemSize(tokens=audio.num_tokens, spans=(audio.num_tokens,))
                for audio in self.audios
            ],
            "language": [
                replace(size, needs={**size.needs, "audio": self.heard(number)})
                for number, size in enumerate(plain["language"])
            ],
        }

    def num_output_rows(self, module: str, item: int) -> int:
        """Rows of features of an image or a clip, losses of a sequence."""
        if module == "audio":
            return self.audios[item].num_rows
        return super().num_output_rows(module, item)

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
        return replace(super()._one_sequence(item), media=tuple(media))

    def _join(self, parts: Sequence[LanguageBatch]) -> LanguageBatch:
        media = tuple(one for part in parts for one in part.media or ())
        return replace(super()._join(parts), media=media)


@dataclass(frozen=True, kw_only=True)
class OmniSettings:
    """A data set and how it is read."""

    samples: Path
    media_folder: Path
    """The folder that names of images and audio files are relative to."""
    tokenizer: Path
    seq_length: int
    limits: ImageLimits
    audio_rate: int
    """Samples per second that all files must have."""
    num_mels: int


class OmniRecord(NamedTuple):
    """What is known of a sample; ``error`` is the reason why it cannot be used."""

    grid: tuple[int, int] | None
    audio_tokens: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class OmniIndex:
    """One record for each sample of the file, in its order."""

    source: str
    samples: tuple[OmniRecord, ...]


def build_omni_index(settings: OmniSettings, folder: Path) -> Path:
    """Check all samples and write what is known of them; one process calls this.

    Bad samples are recorded, not raised: see ``usable_samples``.

    Raises:
        DataError: The file of the samples or the tokenizer cannot be used at all.
    """
    raw_samples = read_samples(settings.samples)
    tokenizer = load_tokenizer(settings.tokenizer)
    digest = hashlib.sha256(repr((_FORMAT, _VERSION, settings, tokenizer.digest)).encode())
    digest.update(settings.samples.read_bytes())
    for raw in raw_samples:
        for field in ("image", "audio"):
            name = raw.get(field) if isinstance(raw, Mapping) else None
            if isinstance(name, str) and os.path.exists(settings.media_folder / name):
                status = os.stat(settings.media_folder / name)
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    path = folder / f"omni-index-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        records = [_record(raw, n, settings, tokenizer) for n, raw in enumerate(raw_samples)]
        index = {"format": _FORMAT, "version": _VERSION, "source": str(settings.samples)}
        write_atomically(path, json.dumps(index | {"samples": records}))
    return path


def load_omni_index(path: Path) -> OmniIndex:
    """Read an index that ``build_omni_index`` wrote.

    Raises:
        DataError: The file cannot be read or is no index of this version.
    """
    data = read_json(path, DataError)
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (
        _FORMAT,
        _VERSION,
    ):
        raise DataError(f"{path}: not an index of version {_VERSION}; delete it, it is made again")
    records = tuple(
        OmniRecord(None if grid is None else (grid[0], grid[1]), tokens, error)
        for grid, tokens, error in data["samples"]
    )
    return OmniIndex(source=data["source"], samples=records)


def _record(raw: Any, number: int, settings: OmniSettings, tokenizer: VlmTokenizer) -> OmniRecord:
    name = sample_name(raw, number)
    try:
        if not isinstance(raw, Mapping):
            raise DataError(f"expected an object, found {type(raw).__name__}")
        for field in ("question", "answer"):
            if not isinstance(raw.get(field), str) or not raw[field]:
                raise DataError(f"field {field!r} is missing or not a text")
        grid, audio_tokens = None, 0
        if raw.get("image") is not None:
            size = decode_image(settings.media_folder / str(raw["image"])).size
            grid = choose_grid(*size, settings.limits)
        if raw.get("audio") is not None:
            samples = read_wav_length(
                settings.media_folder / str(raw["audio"]), settings.audio_rate
            )
            audio_tokens = num_audio_tokens(samples, settings.audio_rate)
        rows = (num_image_tokens(grid) if grid else 0) + audio_tokens // PATCHES_PER_TOKEN
        text, _ = _text(raw, tokenizer)
    except DataError as error:
        return OmniRecord(None, 0, f"{name}: {error}")
    try:
        check_length(name, len(text), rows, settings.seq_length)
    except DataError as error:
        return OmniRecord(None, 0, str(error))
    return OmniRecord(grid, audio_tokens)


def _text(raw: Mapping[str, Any], tokenizer: VlmTokenizer) -> tuple[list[int], list[bool]]:
    """Tokens without media, and which of them are learned; media stand after the second one."""
    question = [*tokenizer.encode_text(raw["question"]), tokenizer.gpt_id]
    answer = [*tokenizer.encode_text(raw["answer"]), tokenizer.eos_id]
    tokens = [tokenizer.bos_id, tokenizer.human_id, *question, *answer]
    return tokens, [False] * (2 + len(question)) + [True] * len(answer)


class OmniDataset(Dataset[OmniSequence]):
    """``num_samples`` sequences over as many epochs as they take; sequence ``i`` depends on the
    data and ``(seed, i)`` alone.

    Args:
        subset: Numbers of the samples to use.
        decode_media: Whether this rank needs pixels and sounds; sizes are known without.

    Raises:
        DataError: The data set holds bad samples, or none in the subset.
    """

    def __init__(
        self,
        settings: OmniSettings,
        index: OmniIndex,
        *,
        num_samples: int,
        seed: int,
        subset: Sequence[int],
        decode_media: bool = True,
        skip_bad_samples: bool = False,
    ) -> None:
        usable = usable_samples(index, skip_bad_samples=skip_bad_samples)
        self._numbers = sorted(set(usable).intersection(subset))
        if not self._numbers:
            raise DataError(f"{index.source}: no usable sample in the given subset")
        self._settings, self._index = settings, index
        self._raw = read_samples(settings.samples)
        self._tokenizer = load_tokenizer(settings.tokenizer)
        self._num_samples, self._seed, self._decode = num_samples, seed, decode_media

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int) -> OmniSequence:
        """
        Raises:
            DataError: A file changed or vanished since the index was made.
        """
        if not 0 <= i < self._num_samples:
            raise IndexError(f"no sequence {i}: the data set has {self._num_samples}")
        epoch, place = divmod(i, len(self._numbers))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._numbers))
        number = self._numbers[order[place]]
        raw, record = self._raw[number], self._index.samples[number]
        images = () if record.grid is None else (self._image(raw, record.grid),)
        audios = () if not record.audio_tokens else (self._audio(raw, record.audio_tokens),)
        num_rows = sum(image.num_tokens for image in images)
        num_rows += sum(audio.num_rows for audio in audios)
        tokens, learned = _text(raw, self._tokenizer)
        tokens[2:2] = [self._tokenizer.image_id] * num_rows
        learned[2:2] = [False] * num_rows
        return OmniSequence(
            tokens=torch.tensor(tokens),
            labels=torch.tensor([*tokens[1:], 0]),
            loss_mask=torch.tensor([*learned[1:], False], dtype=torch.float32),
            span_lengths=(len(tokens),),
            images=images,
            image_positions=torch.arange(2, 2 + num_rows),
            audios=audios,
        )

    def collate_fn(self, sequences: Sequence[OmniSequence]) -> OmniMicrobatch:
        """The sequences of one microbatch together."""
        patch_values = NUM_CHANNELS * self._settings.limits.patch_size**2
        return OmniMicrobatch(sequences=tuple(sequences), values_per_patch=patch_values)

    def _image(self, raw: Mapping[str, Any], grid: tuple[int, int]) -> ImageData:
        if not self._decode:
            return ImageData(grid=grid, pixels=None)
        image = decode_image(self._settings.media_folder / raw["image"])
        pixels = image_patches(image, grid, self._settings.limits.patch_size)
        return ImageData(grid=grid, pixels=pixels)

    def _audio(self, raw: Mapping[str, Any], num_tokens: int) -> AudioData:
        if not self._decode:
            return AudioData(num_tokens=num_tokens, mels=None)
        rate = self._settings.audio_rate
        path = self._settings.media_folder / raw["audio"]
        mels = torch.from_numpy(log_mel(read_wav(path, rate), rate, self._settings.num_mels))
        if len(mels) != 2 * num_tokens:
            raise DataError(f"audio {path} changed after the index was made; start again")
        return AudioData(num_tokens=num_tokens, mels=mels)
