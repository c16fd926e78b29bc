"""Video-text pairs: their index with the latents of every clip, and the data set.

The data set is a JSON list of ``{"id": "cat-3", "video": "cat-3.mp4", "caption": "A cat."}``; a
picture is a video of one frame.  Its index is made once, by one process, and read by all: every
clip is decoded to the end and encoded, so that no rank finds out in the middle of training that a
video is broken, and no rank spends time on encoding.  The latents lie beside the index, one file
for each clip, under a digest of all that they depend on.
"""

import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_dip.costs import ItemSizes
from megatron_dip.errors import DataError
from megatron_dip.families.data.fields import say_unread
from megatron_dip.families.data.files import file_facts
from megatron_dip.families.data.index import (
    INDEX_VERSION,
    kept_index,
    read_index,
    shuffled,
    usable_samples,
    write_index,
)
from megatron_dip.families.data.progress import map_with_progress
from megatron_dip.families.data.samples import read_samples
from megatron_dip.families.data.tokenizer import VlmTokenizer, load_tokenizer
from megatron_dip.families.t2v.batches import Clip, ClipMicrobatch, clip_items
from megatron_dip.families.t2v.latents import PATCH_SIDE, LatentEncoder, make_encoder, patches_of
from megatron_dip.families.t2v.samples import ClipSample, parse_clip_sample
from megatron_dip.families.t2v.videos import ClipLimits, read_clip
from megatron_dip.files import write_atomically
from megatron_dip.text_form import OUR_TEXT_FORM, TextForm

__all__ = [
    "ClipDataset",
    "ClipIndex",
    "ClipRecord",
    "ClipSettings",
    "build_clip_index",
    "draw_time_and_noise",
    "load_clip_index",
]

_FORMAT = "megatron-dip/clip-index"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """A data set and how it is read."""

    samples: Path
    """The JSON list of samples."""
    video_folder: Path
    """The folder that names of videos are relative to."""
    tokenizer: Path
    max_text_tokens: int
    """Of a caption with its marks; a longer one is a bad sample."""
    latent_channels: int
    vae: Path | None
    """An encoder in the format of diffusers; the fixed transform where not given."""
    limits: ClipLimits
    text_form: TextForm = OUR_TEXT_FORM
    """How texts are written for the tokenizer."""


class ClipRecord(NamedTuple):
    """What is known of a sample; ``error`` is the reason why it cannot be used."""

    tokens: tuple[int, ...]
    grid: tuple[int, int, int]
    error: str | None = None
    latents_bytes: int = 0
    latents_sha256: str = ""
    """Of the file of its latents."""


@dataclass(frozen=True, kw_only=True)
class ClipIndex:
    """One record for each sample of the file, in its order."""

    digest: str
    source: str
    """The file of the samples, for messages."""
    folder: Path
    """Where the latents are."""
    samples: tuple[ClipRecord, ...]
    settings: ClipSettings | None = field(default=None, compare=False)
    """Where given, latents that are damaged are made again."""

    def latents(self, number: int) -> Tensor:
        """The patches of clip ``number``: ``[N, V]`` float32.

        Raises:
            DataError: The file is missing or damaged and cannot be made again.
        """
        path = self.latents_path(number)
        try:
            content = path.read_bytes()
            is_whole = hashlib.sha256(content).hexdigest() == self.samples[number].latents_sha256
            reason = None if is_whole else "damaged"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            content = self._make_again(number, f"its latents {path} cannot be read ({reason})")
        return torch.from_numpy(np.load(io.BytesIO(content)))

    def latents_path(self, number: int) -> Path:
        """The file of the latents of clip ``number``."""
        return self.folder / f"{number}.npy"

    def has_latents(self, number: int) -> bool:
        """Whether a file of the right size is there, or none is wanted."""
        record = self.samples[number]
        try:
            return bool(record.error) or (
                self.latents_path(number).stat().st_size == record.latents_bytes
            )
        except OSError:
            return False

    def _make_again(self, number: int, what: str) -> bytes:
        """The content of a file of latents, which is written where that is possible."""
        where = f"{self.source}: sample number {number}: {what}"
        if self.settings is None:
            raise DataError(f"{where}; start again, they are made again")
        logger.warning("%s: they are made again", where)
        settings = self.settings
        encoder = make_encoder(settings.latent_channels, settings.vae)
        sample = parse_clip_sample(read_samples(settings.samples)[number], number)
        content, _ = _encode(sample, settings, encoder)
        if hashlib.sha256(content).hexdigest() != self.samples[number].latents_sha256:
            raise DataError(
                f"{where}, and the video or its encoder is another one now; start again, the "
                f"index is made again"
            )
        try:
            write_atomically(self.latents_path(number), content)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self.latents_path(number), error.strerror)
        return content


def build_clip_index(
    settings: ClipSettings, folder: Path, *, show_progress: bool = True, num_threads: int = 4
) -> tuple[ClipIndex, Path]:
    """Make the index, or read it where it is already in ``folder``; one process calls this.

    Bad samples are recorded, not raised: see ``usable_samples``.

    Returns:
        The index and its file, which other processes pass to ``load_clip_index``.

    Raises:
        DataError: The file of the samples, the tokenizer or the encoder cannot be used at all.
    """
    raw_samples = read_samples(settings.samples)
    samples = [_sample_or_error(raw, number) for number, raw in enumerate(raw_samples)]
    parsed = [sample for sample in samples if isinstance(sample, ClipSample)]
    tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
    encoder = make_encoder(settings.latent_channels, settings.vae)
    digest = _digest(settings, parsed, tokenizer, encoder)
    path = folder / f"clip-index-{digest[:16]}.json"
    known: dict[int, ClipRecord] = {}
    if (kept := kept_index(path, load_clip_index)) is not None:
        known = {n: one for n, one in enumerate(kept.samples) if kept.has_latents(n)}
        if len(known) == len(kept.samples):
            return kept, path
        num_lost = len(kept.samples) - len(known)
        logger.warning("latents of %d clips are missing or cut short: made again", num_lost)
    started = time.monotonic()
    latents_folder = path.with_suffix("")
    latents_folder.mkdir(parents=True, exist_ok=True)

    say_unread(str(settings.samples), (sample.unread for sample in parsed))

    def record(number: int) -> ClipRecord:
        if number in known:
            return known[number]
        sample = samples[number]
        if isinstance(sample, DataError):
            return ClipRecord((), (0, 0, 0), str(sample))
        try:
            return _record(sample, number, settings, tokenizer, encoder, path)
        except DataError as error:
            return ClipRecord((), (0, 0, 0), f"{sample.name}: {error}")

    records = map_with_progress(
        record,
        range(len(samples)),
        description="encoding clips",
        show_progress=show_progress,
        num_threads=num_threads,
    )
    # Written last: an index that is there has all of its latents.
    forms = [
        one.error or [one.tokens, one.grid, one.latents_bytes, one.latents_sha256]
        for one in records
    ]
    write_index(path, _FORMAT, settings.samples, forms, digest=digest)
    seconds = time.monotonic() - started
    logger.info("index and latents of %d clips made in %.1f s: %s", len(records), seconds, path)
    return load_clip_index(path), path


def _sample_or_error(raw: Any, number: int) -> ClipSample | DataError:
    try:
        return parse_clip_sample(raw, number)
    except DataError as error:
        return error


def _record(
    sample: ClipSample,
    number: int,
    settings: ClipSettings,
    tokenizer: VlmTokenizer,
    encoder: LatentEncoder,
    index: Path,
) -> ClipRecord:
    """The record of one sample, its latents written."""
    tokens = [*tokenizer.begin(), *tokenizer.encode_text(sample.caption), *tokenizer.end()]
    if len(tokens) > settings.max_text_tokens:
        raise DataError(
            f"its caption has {len(tokens)} tokens, more than model.text.seq_length "
            f"{settings.max_text_tokens}; shorten it, raise seq_length, or skip bad samples"
        )
    content, grid = _encode(sample, settings, encoder)
    write_atomically(index.with_suffix("") / f"{number}.npy", content, is_kept=False)
    return ClipRecord(
        tuple(tokens),
        grid,
        latents_bytes=len(content),
        latents_sha256=hashlib.sha256(content).hexdigest(),
    )


def _encode(
    sample: ClipSample, settings: ClipSettings, encoder: LatentEncoder
) -> tuple[bytes, tuple[int, int, int]]:
    """What the file of a clip's latents holds, and its grid."""
    frames, bucket = read_clip(
        settings.video_folder / sample.video,
        settings.limits,
        PATCH_SIDE * encoder.pixels_per_cell,
    )
    patches, grid = patches_of(encoder.encode(frames))
    assert grid == bucket
    content = io.BytesIO()
    np.save(content, patches.numpy())
    return content.getvalue(), grid


def _digest(
    settings: ClipSettings,
    samples: Sequence[ClipSample],
    tokenizer: VlmTokenizer,
    encoder: LatentEncoder,
) -> str:
    facts: list[Any] = [_FORMAT, INDEX_VERSION, settings.max_text_tokens, asdict(settings.limits)]
    facts += [tokenizer.digest, encoder.digest]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(settings.samples.read_bytes())
    for sample in samples:
        digest.update(file_facts(settings.video_folder, sample.video))
    return digest.hexdigest()


def load_clip_index(path: Path) -> ClipIndex:
    """Read an index that ``build_clip_index`` wrote.

    Raises:
        DataError: The file cannot be read or is no index of this version.
    """

    def parse(data: Any) -> ClipIndex:
        return ClipIndex(
            digest=data["digest"],
            source=data["source"],
            folder=path.with_suffix(""),
            samples=tuple(_parse_record(record) for record in data["samples"]),
        )

    return read_index(path, _FORMAT, parse)


def _parse_record(data: Any) -> ClipRecord:
    if isinstance(data, str):
        return ClipRecord((), (0, 0, 0), data)
    tokens, (frames, rows, columns), num_bytes, digest = data
    return ClipRecord(
        tuple(tokens),
        (frames, rows, columns),
        latents_bytes=num_bytes,
        latents_sha256=digest,
    )


def draw_time_and_noise(key: str, shape: tuple[int, int]) -> tuple[float, Tensor]:
    """A time between 0 and 1, logit-normal (arXiv 2403.03206), and noise; both depend on ``key``.

    Drawn on the CPU from a generator of their own, so that they are the same on every rank,
    whatever else is drawn.
    """
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    draw = torch.randn(1, generator=generator, dtype=torch.float64)
    return float(torch.sigmoid(draw)), torch.randn(shape, generator=generator)


class ClipDataset(Dataset[Clip]):
    """``num_samples`` clips over as many epochs as they take, in an order of its own for each.

    Clip ``i`` of training, its time and its noise are pure functions of the data and ``(seed, i)``:
    they do not depend on the schedule, the split or the number of replicas, and training that goes
    on by its number of consumed samples sees what it would have seen.

    Args:
        num_samples: Clips in all; None for those of one epoch.
        subset: Numbers of the samples to use.
        load_latents: Whether this rank needs latents; sizes are known without.
        stage: ``train`` or ``valid``: they draw different noise.

    Raises:
        DataError: The data set holds bad samples, or none in the subset.
    """

    def __init__(
        self,
        index: ClipIndex,
        *,
        num_samples: int | None,
        seed: int,
        subset: Sequence[int],
        stage: str = "train",
        load_latents: bool = True,
        skip_bad_samples: bool = False,
    ) -> None:
        self._numbers = usable_samples(index, skip_bad_samples=skip_bad_samples, subset=subset)
        self._index = index
        self._num_samples = len(self._numbers) if num_samples is None else num_samples
        self._seed = seed
        self._stage = stage
        self._load_latents = load_latents

    def __len__(self) -> int:
        return self._num_samples

    room = None
    """A clip is a sample by itself."""

    def members(self, i: int) -> tuple[int]:
        """Sample ``i`` alone: its noise goes by its place."""
        return (i,)

    def member_sizes(self, member: int) -> ItemSizes:
        """The caption and the clip at place ``member``; no file is read."""
        record = self._index.samples[self.sample_number(member)]
        items = clip_items(len(record.tokens), math.prod(record.grid))
        return {module: [item] for module, item in items.items()}

    def __getitem__(self, i: int | tuple[int]) -> Clip:
        """
        Raises:
            DataError: The latents cannot be read.
        """
        i = i if isinstance(i, int) else i[0]
        number = self.sample_number(i)
        record = self._index.samples[number]
        latents = self._index.latents(number) if self._load_latents else None
        shape = (0, 0) if latents is None else (latents.shape[0], latents.shape[1])
        time_, noise = draw_time_and_noise(f"{self._seed}:{self._stage}:{number}:{i}", shape)
        return Clip(
            tokens=torch.tensor(record.tokens, dtype=torch.int64),
            grid=record.grid,
            time=time_,
            latents=latents,
            noise=None if latents is None else noise,
        )

    def sample_number(self, i: int) -> int:
        """The sample at place ``i``, as its place in the file."""
        if not 0 <= i < self._num_samples:
            raise IndexError(f"no clip {i}: the data set has {self._num_samples}")
        return shuffled(self._numbers, i, self._seed)

    def collate_fn(self, clips: Sequence[Clip]) -> ClipMicrobatch:
        """The clips of one microbatch together."""
        return ClipMicrobatch(clips=tuple(clips))
