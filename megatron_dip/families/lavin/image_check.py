"""Which images of LaVIN's samples are bad: found before training, by one process, for all ranks.

Every image has one size here, so that nothing else need be known of it.  Decoding all of them takes
about a minute for ScienceQA's 10,000 on four threads; it is done once for the same files.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import file_facts
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.index import INDEX_VERSION, kept_index, read_index, write_index
from megatron_dip.families.data.progress import map_with_progress
from megatron_dip.families.lavin.instructions import Instruction

__all__ = ["ImageFiles", "check_images", "load_checked_images", "split_by_images"]

_FORMAT = "megatron-dip/image-check"
BadImages = Mapping[str, str]
"""By their names, why they are bad."""


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The images of a data set."""

    samples: Path
    """The file that names them, for messages."""
    folder: Path
    names: tuple[str, ...]
    """Relative to ``folder``."""


def check_images(
    files: ImageFiles, folder: Path, *, show_progress: bool = True, num_threads: int = 4
) -> tuple[BadImages, Path]:
    """Decode all images and write down which are bad; one process calls this.

    Args:
        folder: Where the result is kept, for as long as the files stay as they are.

    Returns:
        The bad ones, and the file that says so, for :func:`load_checked_images`.
    """
    names = sorted(set(files.names))
    digest = hashlib.sha256(f"{_FORMAT} {INDEX_VERSION}\n".encode())
    for name in names:
        digest.update(file_facts(files.folder, name))
    path = folder / f"image-check-{digest.hexdigest()[:16]}.json"
    if (kept := kept_index(path, load_checked_images)) is not None:
        return kept, path

    def check(name: str) -> str | None:
        try:
            decode_image(files.folder / name)
        except DataError as error:
            return str(error)
        return None

    found = map_with_progress(
        check,
        names,
        description="checking images",
        show_progress=show_progress,
        num_threads=num_threads,
    )
    bad = [[name, error] for name, error in zip(names, found, strict=True) if error is not None]
    write_index(path, _FORMAT, files.samples, bad)
    return load_checked_images(path), path


def load_checked_images(path: Path) -> BadImages:
    """What :func:`check_images` wrote.

    Raises:
        DataError: The file cannot be read or is none of this version.
    """

    def parse(data: Any) -> BadImages:
        return {str(name): str(error) for name, error in data["samples"]}

    return read_index(path, _FORMAT, parse)


def split_by_images(
    samples: Sequence[Instruction], bad: BadImages
) -> tuple[list[Instruction], list[str]]:
    """The samples without a bad image, and why the others cannot be used."""
    good, errors = [], []
    for sample in samples:
        error = None if sample.image is None else bad.get(str(sample.image))
        if error is None:
            good.append(sample)
        else:
            errors.append(f"{sample.name}: {error}")
    return good, errors
