"""The index of a data set: what every rank must agree on before training starts.

It is made once, by one process, and read by all: per sample its number of text tokens and its
images, or the reason why it cannot be used.  Every image is really decoded while it is made, so
that no rank finds out in the middle of training that an image is broken.  It is kept in a file
named after a digest of all that it depends on; when nothing changed, it is not made again.

No process groups here: the caller knows which rank makes the index and which ranks wait.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_dip.errors import DataError, one_line
from megatron_dip.families.data.fields import say_unread
from megatron_dip.families.data.files import shown_path
from megatron_dip.families.data.images import Grid, ImageLimits, choose_grid, image_patches
from megatron_dip.families.data.progress import map_with_progress
from megatron_dip.families.data.samples import Sample, check_length, encode_text
from megatron_dip.families.data.sources import DataSettings, SampleSource, open_source
from megatron_dip.families.data.tokenizer import VlmTokenizer, load_tokenizer
from megatron_dip.files import write_atomically
from megatron_dip.forms import digest_of
from megatron_dip.reading import read_json

__all__ = [
    "INDEX_VERSION",
    "CheckedSample",
    "CheckedSamples",
    "DataIndex",
    "ImageRecord",
    "SampleRecord",
    "build_index",
    "check_bad_samples",
    "index_digest",
    "index_path",
    "kept_index",
    "load_index",
    "read_index",
    "recorded_patches",
    "shuffled",
    "split_samples",
    "split_source",
    "usable_samples",
    "write_index",
]

_FORMAT = "megatron-dip/data-index"
INDEX_VERSION = 4
"""Higher whenever files are read in another way, so that what was made of them is made again."""
_POLL_S = 0.2
_NUM_SHOWN, _MAX_SHOWN = 3, 400

logger = logging.getLogger(__name__)


class ImageRecord(NamedTuple):
    """Size in pixels, as seen, and the grid of patches."""

    width: int
    height: int
    rows: int
    columns: int
    merge_size: int

    @classmethod
    def of(cls, size: tuple[int, int], limits: ImageLimits) -> Self:
        """An image of ``size`` pixels, width first."""
        grid = choose_grid(*size, limits)
        return cls(*size, grid.rows, grid.columns, grid.merge_size)

    @property
    def grid(self) -> Grid:
        return Grid(self.rows, self.columns, self.merge_size)


def recorded_patches(image: Image.Image, name: str, record: ImageRecord, patch_size: int) -> Tensor:
    """The patches of an image that the index knows.

    Raises:
        DataError: It has another size, so that other tokens would stand for it.
    """
    if image.size != (record.width, record.height):
        raise DataError(
            f"image {shown_path(name)} is {image.width}x{image.height}, but was "
            f"{record.width}x{record.height} when the index was made"
        )
    return image_patches(image, record.grid, patch_size)


class SampleRecord(NamedTuple):
    """What is known of a sample; ``error`` is the reason why it cannot be used."""

    num_text_tokens: int
    images: tuple[ImageRecord, ...]
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Text and image tokens together."""
        return self.num_text_tokens + sum(image.grid.num_tokens for image in self.images)


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """The index: one record for each sample of the file, in its order."""

    digest: str
    source: str
    """The file of the samples, for messages."""
    samples: tuple[SampleRecord, ...]


def write_index(
    path: Path, index_format: str, source: Path, samples: Sequence[Any], **more: Any
) -> None:
    """Write the file of an index of any kind, with the form of every sample."""
    head = {"format": index_format, "version": INDEX_VERSION, "source": str(source)}
    data = head | more | {"samples": samples}
    write_atomically(path, json.dumps(data | {"sha256": digest_of(data)}))


def read_index[IndexT](path: Path, index_format: str, parse: Callable[[Any], IndexT]) -> IndexT:
    """What ``parse`` makes of a file that :func:`write_index` wrote.

    Raises:
        DataError: The file cannot be read, is damaged, or is no index of this version.
    """
    data = read_json(path, DataError)
    remedy = f"{path}: not an index of version {INDEX_VERSION}; delete it, it is made again"
    try:
        if data["format"] != index_format or data["version"] != INDEX_VERSION:
            raise DataError(remedy)
        if data.pop("sha256") != digest_of(data):
            raise DataError(f"{path}: damaged; delete it, it is made again")
        return parse(data)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(remedy) from error


def kept_index[IndexT](path: Path, load: Callable[[Path], IndexT]) -> IndexT | None:
    """The index in ``path``; None where there is none yet, or none that can be read."""
    if not path.exists():
        return None
    try:
        return load(path)
    except DataError as error:
        logger.warning("the index is made again: %s", error)
        return None


def _digest(settings: DataSettings, source: SampleSource, tokenizer: VlmTokenizer) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {INDEX_VERSION}".encode())
    numbers = {key: value for key, value in asdict(settings).items() if isinstance(value, int)}
    digest.update(json.dumps(numbers, sort_keys=True).encode())
    digest.update(tokenizer.digest.encode())
    for fact in source.facts():
        digest.update(fact)
    return digest.hexdigest()


def index_digest(settings: DataSettings) -> str:
    """SHA-256 over samples, tokenizer, settings, and name, size and time of every image or shard.

    Raises:
        DataError: The samples or the tokenizer cannot be read.
    """
    return _digest(
        settings, open_source(settings), load_tokenizer(settings.tokenizer, settings.text_form)
    )


def index_path(digest: str, folder: str | Path) -> Path:
    """Where the index with this digest is kept inside ``folder``."""
    return Path(folder) / f"data-index-{digest[:16]}.json"


def build_index(
    settings: DataSettings,
    folder: str | Path,
    *,
    show_progress: bool = True,
    num_threads: int = 4,
) -> tuple[DataIndex, Path]:
    """Make the index, or read it where it is already in ``folder``; one process calls this.

    Bad samples are recorded, not raised: see ``usable_samples``.

    Returns:
        The index and its file, which other processes pass to ``load_index``.

    Raises:
        DataError: The samples or the tokenizer cannot be used at all.
    """
    settings.limits.check()
    source = open_source(settings)
    tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
    digest = _digest(settings, source, tokenizer)
    path = index_path(digest, folder)
    if (kept := kept_index(path, load_index)) is not None:
        return kept, path
    started = time.monotonic()
    samples = [_sample_or_error(source, number) for number in range(len(source))]
    parsed = [sample for sample in samples if isinstance(sample, Sample)]
    say_unread(str(settings.samples), (sample.unread for sample in parsed))
    names = sorted({name for sample in parsed for name in sample.images})
    images = _decode_all(settings, source, names, show_progress, num_threads)
    records = tuple(_record(sample, images, tokenizer, settings.seq_length) for sample in samples)
    index = DataIndex(digest=digest, source=str(settings.samples), samples=records)
    forms = [s.error or [s.num_text_tokens, [list(i) for i in s.images]] for s in records]
    write_index(path, _FORMAT, settings.samples, forms, digest=digest)
    logger.info(
        "index of %d samples and %d images made in %.1f s: %s",
        len(records),
        len(names),
        time.monotonic() - started,
        path,
    )
    return index, path


def _sample_or_error(source: SampleSource, number: int) -> Sample | DataError:
    try:
        return source.sample(number)
    except DataError as error:
        return error


def _decode_all(
    settings: DataSettings,
    source: SampleSource,
    names: Sequence[str],
    show_progress: bool,
    num_threads: int,
) -> dict[str, ImageRecord | DataError]:
    """Decode every image once; broken ones are kept as their error."""

    def decode(name: str) -> ImageRecord | DataError:
        try:
            size = source.image(name).size
        except DataError as error:
            return error
        return ImageRecord.of(size, settings.limits)

    records = map_with_progress(
        decode,
        names,
        description="checking images",
        show_progress=show_progress,
        num_threads=num_threads,
    )
    return dict(zip(names, records, strict=True))


def _record(
    sample: Sample | DataError,
    images: dict[str, ImageRecord | DataError],
    tokenizer: VlmTokenizer,
    seq_length: int,
) -> SampleRecord:
    if isinstance(sample, DataError):
        return SampleRecord(0, (), str(sample))
    try:
        return _good_record(sample, images, tokenizer, seq_length)
    except DataError as error:
        return SampleRecord(0, (), str(error))


def _good_record(
    sample: Sample,
    images: dict[str, ImageRecord | DataError],
    tokenizer: VlmTokenizer,
    seq_length: int,
) -> SampleRecord:
    records = []
    for name in sample.images:
        image = images[name]
        if isinstance(image, DataError):
            raise DataError(f"{sample.name}: {image}")
        records.append(image)
    num_text_tokens = encode_text(sample, tokenizer).num_text_tokens(tokenizer.media_ids)
    record = SampleRecord(num_text_tokens, tuple(records))
    check_length(sample.name, num_text_tokens, record.num_tokens - num_text_tokens, seq_length)
    return record


def load_index(path: str | Path) -> DataIndex:
    """Read an index that ``build_index`` wrote.

    Raises:
        DataError: The file cannot be read or is no index of this version.
    """

    def parse(data: Any) -> DataIndex:
        samples = tuple(_parse_record(record) for record in data["samples"])
        return DataIndex(digest=data["digest"], source=data["source"], samples=samples)

    return read_index(Path(path), _FORMAT, parse)


def _parse_record(data: Any) -> SampleRecord:
    if isinstance(data, str):
        return SampleRecord(0, (), data)
    num_text_tokens, images = data
    return SampleRecord(num_text_tokens, tuple(ImageRecord(*image) for image in images))


class CheckedSample(Protocol):
    """What an index knows of a sample at least."""

    @property
    def error(self) -> str | None:
        """The reason why it cannot be used."""
        ...


class CheckedSamples(Protocol):
    """What an index of any kind has."""

    @property
    def source(self) -> str:
        """The file of the samples, for messages."""
        ...

    @property
    def samples(self) -> Sequence[CheckedSample]:
        """In the order of the file."""
        ...


def usable_samples(
    index: CheckedSamples, *, skip_bad_samples: bool, subset: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The numbers of the samples to train on, ascending; those of ``subset``, where it is given.

    Raises:
        DataError: A sample is bad and bad samples are not to be skipped, or none is left.
    """
    good = tuple(number for number, record in enumerate(index.samples) if not record.error)
    errors = [record.error for record in index.samples if record.error]
    check_bad_samples(index.source, errors, len(good), skip_bad_samples=skip_bad_samples)
    if subset is not None:
        good = tuple(sorted(set(good).intersection(subset)))
        if not good:
            raise DataError(
                f"{index.source}: no usable sample among those kept for training or validation; "
                f"see data.valid_share, or the splits of the data set"
            )
    return good


def check_bad_samples(
    source: str, errors: Sequence[str], num_good: int, *, skip_bad_samples: bool
) -> None:
    """Refuse a data set, or log what is left out of it, for the ``errors`` of its bad samples.

    Raises:
        DataError: A sample is bad and bad samples are not to be skipped, or none is good.
    """
    if errors and not skip_bad_samples:
        more = f" (and {len(errors) - 1} more bad samples)" if len(errors) > 1 else ""
        raise DataError(f"{source}: {errors[0]}{more}")
    if not num_good:
        reason = (
            f"all {len(errors)} samples are bad; the first: {errors[0]}"
            if errors
            else "holds no samples"
        )
        raise DataError(f"{source}: {reason}")
    if errors:
        first = "; ".join(one_line(error, _MAX_SHOWN) for error in errors[:_NUM_SHOWN])
        more = "; ..." if len(errors) > _NUM_SHOWN else ""
        total = len(errors) + num_good
        logger.warning(
            "%s: left out %d bad of %d samples: %s%s", source, len(errors), total, first, more
        )


def shuffled(numbers: Sequence[int], i: int, seed: int) -> int:
    """Which of ``numbers`` comes at place ``i``, where every epoch has an order of its own."""
    epoch, place = divmod(i, len(numbers))
    return numbers[np.random.default_rng([seed, epoch]).permutation(len(numbers))[place]]


def split_samples(
    numbers: Sequence[int], valid_share: float, seed: int, *, needs_valid: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut ``numbers`` into those to train on and those to validate on, by chance but repeatably.

    Args:
        needs_valid: Whether any must be kept for validation.  Where none need be and there are too
            few samples to cut, all are to train on.

    Raises:
        DataError: One of the two would be empty.
    """
    count = round(len(numbers) * valid_share)
    if not 0 < count < len(numbers):
        if not needs_valid:
            return tuple(numbers), ()
        raise DataError(
            f"a share of {valid_share} of {len(numbers)} samples for validation leaves one side "
            f"empty; give another share or more samples, or leave evaluation out"
        )
    order = np.random.default_rng(seed).permutation(len(numbers)).tolist()
    held_out = sorted(numbers[place] for place in order[:count])
    rest = sorted(numbers[place] for place in order[count:])
    return tuple(rest), tuple(held_out)


def split_source(
    source: SampleSource, valid_share: float, seed: int, *, needs_valid: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As ``split_samples``, unless the data set says itself what is kept for validation.

    Raises:
        DataError: See there.
    """
    if not source.valid_numbers:
        numbers = range(len(source))
        return split_samples(numbers, valid_share, seed, needs_valid=needs_valid)
    held_out = set(source.valid_numbers)
    return tuple(n for n in range(len(source)) if n not in held_out), source.valid_numbers
