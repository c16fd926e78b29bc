"""Questions about images and sounds: samples, their index, and the data set of sequences.

See ``omni_samples`` for the form of a sample.  One is a sequence: the rows of the image and of the
audio, the question and the answer, which is learned.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.errors import DataError
from megatron_dip.families.data.conversation import EncodedText, Part, TurnParts, encode_turns
from megatron_dip.families.data.fields import say_unread
from megatron_dip.families.data.files import file_facts, shown_path
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.images import (
    NUM_CHANNELS,
    ImageLimits,
    blank_patches,
    image_item,
)
from megatron_dip.families.data.index import (
    INDEX_VERSION,
    ImageRecord,
    kept_index,
    read_index,
    recorded_patches,
    shuffled,
    usable_samples,
    write_index,
)
from megatron_dip.families.data.samples import check_length, read_samples
from megatron_dip.families.data.stand_ins import StandIns
from megatron_dip.families.data.tokenizer import VlmTokenizer, load_tokenizer
from megatron_dip.families.omni.audio import (
    log_mel,
    num_audio_tokens,
    silent_mel,
)
from megatron_dip.families.omni.audio_files import read_sound
from megatron_dip.families.omni.batches import (
    AudioData,
    OmniMicrobatch,
    OmniSequence,
    num_sound_rows,
    sound_item,
)
from megatron_dip.families.omni.samples import OmniSample, parse_omni_samples
from megatron_dip.families.vlm.batches import ImageData
from megatron_dip.families.vlm.dataset import UNDIVIDED, Division, collate
from megatron_dip.text_form import OUR_TEXT_FORM, TextForm

__all__ = [
    "OmniDataset",
    "OmniIndex",
    "OmniSettings",
    "build_omni_index",
    "load_omni_index",
]

_FORMAT = "megatron-dip/omni-index"


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
    text_form: TextForm = OUR_TEXT_FORM
    """How texts are written for the tokenizer."""


class OmniRecord(NamedTuple):
    """What is known of a sample; ``error`` is the reason why it cannot be used."""

    image: ImageRecord | None
    audio_tokens: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class OmniIndex:
    """One record for each sample of the file, in its order."""

    source: str
    samples: tuple[OmniRecord, ...]


def build_omni_index(settings: OmniSettings, folder: Path) -> tuple[OmniIndex, Path]:
    """Check all samples and write what is known of them; one process calls this.

    Bad samples are recorded, not raised: see ``usable_samples``.

    Returns:
        The index and its file, which other processes pass to ``load_omni_index``.

    Raises:
        DataError: The file of the samples or the tokenizer cannot be used at all.
    """
    samples = parse_omni_samples(read_samples(settings.samples))
    parsed = [sample for sample in samples if isinstance(sample, OmniSample)]
    tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
    digest = hashlib.sha256(repr((_FORMAT, INDEX_VERSION, settings, tokenizer.digest)).encode())
    digest.update(settings.samples.read_bytes())
    for sample in parsed:
        for name in (sample.image, sample.audio):
            if name is not None:
                digest.update(file_facts(settings.media_folder, name))
    path = folder / f"omni-index-{digest.hexdigest()[:16]}.json"
    if kept_index(path, load_omni_index) is None:
        say_unread(str(settings.samples), (sample.unread for sample in parsed))
        records = [_record(sample, settings, tokenizer) for sample in samples]
        write_index(path, _FORMAT, settings.samples, records)
    return load_omni_index(path), path


def load_omni_index(path: Path) -> OmniIndex:
    """Read an index that ``build_omni_index`` wrote.

    Raises:
        DataError: The file cannot be read or is no index of this version.
    """

    def parse(data: Any) -> OmniIndex:
        records = tuple(
            OmniRecord(None if image is None else ImageRecord(*image), tokens, error)
            for image, tokens, error in data["samples"]
        )
        return OmniIndex(source=data["source"], samples=records)

    return read_index(path, _FORMAT, parse)


def _record(
    sample: OmniSample | DataError, settings: OmniSettings, tokenizer: VlmTokenizer
) -> OmniRecord:
    if isinstance(sample, DataError):
        return OmniRecord(None, 0, str(sample))
    try:
        image, audio_tokens = None, 0
        if sample.image is not None:
            size = decode_image(settings.media_folder / sample.image).size
            image = ImageRecord.of(size, settings.limits)
        if sample.audio is not None:
            sound = read_sound(settings.media_folder / sample.audio, settings.audio_rate)
            audio_tokens = num_audio_tokens(len(sound), settings.audio_rate)
        rows = (image.grid.num_tokens if image else 0) + num_sound_rows(audio_tokens)
        num_text_tokens = _encode(sample, tokenizer).num_text_tokens(tokenizer.media_ids)
    except DataError as error:
        return OmniRecord(None, 0, f"{sample.name}: {error}")
    try:
        check_length(sample.name, num_text_tokens, rows, settings.seq_length)
    except DataError as error:
        return OmniRecord(None, 0, str(error))
    return OmniRecord(image, audio_tokens)


def _encode(sample: OmniSample, tokenizer: VlmTokenizer) -> EncodedText:
    """The tokens of a sample, image and sound a single one each; both stand before the question."""
    media = [Part("image")] if sample.image is not None else []
    media += [Part("audio")] if sample.audio is not None else []
    turns = (
        TurnParts("human", (*media, Part("text", sample.question))),
        TurnParts("gpt", (Part("text", sample.answer),)),
    )
    return encode_turns(turns, tokenizer, sample.name)


class OmniDataset(Dataset[OmniSequence]):
    """``num_samples`` sequences over as many epochs as they take; sequence ``i`` depends on the
    data and ``(seed, i)`` alone.

    Args:
        num_samples: Sequences in all; None for those of one epoch.
        subset: Numbers of the samples to use.
        decode_media: Whether this rank needs pixels and sounds; sizes are known without.
        division: Of the rows of samples.

    Raises:
        DataError: The data set holds bad samples, or none in the subset.
    """

    def __init__(
        self,
        settings: OmniSettings,
        index: OmniIndex,
        *,
        num_samples: int | None,
        seed: int,
        subset: Sequence[int],
        decode_media: bool = True,
        skip_bad_samples: bool = False,
        division: Division = UNDIVIDED,
    ) -> None:
        self._numbers = usable_samples(index, skip_bad_samples=skip_bad_samples, subset=subset)
        self._settings, self._index = settings, index
        self._samples = parse_omni_samples(read_samples(settings.samples))
        self._tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
        self._num_samples = len(self._numbers) if num_samples is None else num_samples
        self._seed, self._decode = seed, decode_media
        self._stand_ins = StandIns(allowed=skip_bad_samples)
        patch_values = NUM_CHANNELS * settings.limits.patch_size**2
        self.collate_fn = partial(
            collate, make=OmniMicrobatch, values_per_patch=patch_values, division=division
        )
        """Puts the sequences of a microbatch together."""

    def __len__(self) -> int:
        return self._num_samples

    room = None
    """A sequence is one sample."""

    def members(self, i: int) -> tuple[int]:
        """The sample of sequence ``i``, as its place in the file."""
        if not 0 <= i < self._num_samples:
            raise IndexError(f"no sequence {i}: the data set has {self._num_samples}")
        return (shuffled(self._numbers, i, self._seed),)

    def member_sizes(self, member: int) -> ItemSizes:
        """The image, the sound and the tokens of a sample; its files are not read."""
        sample, record = self._sample(member), self._index.samples[member]
        images = [] if record.image is None else [image_item(record.image.grid)]
        audios = [] if sample.audio is None else [sound_item(record.audio_tokens)]
        rows = sum(item.num_output_rows for item in (*images, *audios))
        num_text_tokens = _encode(sample, self._tokenizer).num_text_tokens(
            self._tokenizer.media_ids
        )
        num_tokens = num_text_tokens + rows
        language = [ItemSize(tokens=num_tokens, spans=(num_tokens,))]
        return {"vision": images, "audio": audios, "language": language}

    def _sample(self, number: int) -> OmniSample:
        sample = self._samples[number]
        if isinstance(sample, DataError):
            raise DataError(f"{self._index.source}: {sample}; it was good before, start again")
        return sample

    def __getitem__(self, i: int | tuple[int]) -> OmniSequence:
        """
        Args:
            i: The number of a sequence, or its sample, as :meth:`members` has it.

        Raises:
            DataError: A file went bad since the index was made; see ``StandIns``.
        """
        (number,) = self.members(i) if isinstance(i, int) else i
        sample, record = self._sample(number), self._index.samples[number]
        images = () if record.image is None else (self._image(sample, record.image),)
        audios = () if sample.audio is None else (self._audio(sample, record.audio_tokens),)
        rows = [image.num_tokens for image in images] + [audio.num_rows for audio in audios]
        media_ids = self._tokenizer.media_ids
        text = _encode(sample, self._tokenizer).expand(media_ids, rows)
        tokens, learned = text.tokens, text.trained
        positions = [place for place, token in enumerate(tokens) if token in media_ids]
        return OmniSequence(
            tokens=torch.tensor(tokens),
            labels=torch.tensor([*tokens[1:], 0]),
            loss_mask=torch.tensor([*learned[1:], False], dtype=torch.float32),
            span_lengths=(len(tokens),),
            images=images,
            image_positions=torch.tensor(positions, dtype=torch.int64),
            audios=audios,
        )

    def _image(self, sample: OmniSample, record: ImageRecord) -> ImageData:
        if not self._decode:
            return ImageData(grid=record.grid, pixels=None)
        name, patch_size = sample.image, self._settings.limits.patch_size
        assert name is not None
        path = self._settings.media_folder / name
        pixels = self._stand_ins.read(
            f"{self._index.source}: {sample.name}",
            lambda: recorded_patches(decode_image(path), name, record, patch_size),
            lambda: blank_patches(record.grid, patch_size),
        )
        return ImageData(grid=record.grid, pixels=pixels)

    def _audio(self, sample: OmniSample, num_tokens: int) -> AudioData:
        if not self._decode:
            return AudioData(num_tokens=num_tokens, mels=None)
        settings, name = self._settings, sample.audio
        assert name is not None

        def read() -> NDArray[np.float32]:
            samples = read_sound(settings.media_folder / name, settings.audio_rate)
            if num_audio_tokens(len(samples), settings.audio_rate) != num_tokens:
                raise DataError(
                    f"audio {shown_path(name)} has {len(samples)} samples, another length than "
                    f"when the index was made"
                )
            return log_mel(samples, settings.audio_rate, settings.num_mels)

        mels = self._stand_ins.read(
            f"{self._index.source}: {sample.name}",
            read,
            lambda: silent_mel(num_tokens, settings.num_mels),
        )
        return AudioData(num_tokens=num_tokens, mels=torch.from_numpy(mels))
