"""Where samples and images are kept: what index and data set read them through.

Two kinds: LLaVA's form (a JSON list and a folder of images), and webdataset shards, see
``energon``.  From here on nothing differs between them: the same samples in the same order give
the same index, the same packed sequences and the same microbatches.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from megatron_dip.errors import DataError
from megatron_dip.families.data.files import file_facts
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.images import ImageLimits
from megatron_dip.families.data.samples import Sample, parse_sample, read_samples
from megatron_dip.text_form import OUR_TEXT_FORM, TextForm

__all__ = ["DataSettings", "LlavaFiles", "SampleSource", "open_source"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """A data set and how it is read."""

    samples: Path
    """The JSON list of samples, or the folder of an energon data set."""
    image_folder: Path | None
    """The folder that image names are relative to; None where shards hold the images."""
    tokenizer: Path
    """The JSON file of the tokenizer."""
    seq_length: int
    """Most tokens of a sample, and of a packed sequence."""
    patch_size: int
    min_image_tokens: int
    max_image_tokens: int
    merge_size: int = 2
    """Patches along each side of the square that becomes a language token."""
    format: Literal["llava", "energon"] = "llava"
    text_form: TextForm = OUR_TEXT_FORM
    """How texts are written for the tokenizer."""

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(
            self.patch_size, self.min_image_tokens, self.max_image_tokens, self.merge_size
        )


class SampleSource(Protocol):
    """Samples by number, and images by the names that samples give them.

    Used by several threads at a time, and by processes that are forked.
    """

    @property
    def valid_numbers(self) -> tuple[int, ...]:
        """The samples that the data set itself keeps for validation; often none."""
        ...

    def __len__(self) -> int: ...

    def sample(self, number: int) -> Sample:
        """
        Raises:
            DataError: The sample cannot be read or is not in LLaVA's form.
        """
        ...

    def image(self, name: str) -> Image.Image:
        """The image as RGB, see ``decode_image``.

        Raises:
            DataError: It is missing or does not decode; the message names it.
        """
        ...

    def facts(self) -> Iterator[bytes]:
        """What differs whenever samples or images differ: an index belongs to these."""
        ...


def open_source(settings: DataSettings) -> SampleSource:
    """
    Raises:
        DataError: There is no data set of this format, or what reads it is not installed.
    """
    if settings.format == "energon":
        # Not at the top: the package behind it is optional, and slow to import.
        from megatron_dip.families.data.energon import EnergonShards

        return EnergonShards(settings.samples)
    if settings.image_folder is None:
        raise DataError(f"{settings.samples}: no image_folder given; name the folder of the images")
    return LlavaFiles(settings.samples, settings.image_folder)


class LlavaFiles:
    """A JSON list of samples, and a folder of images."""

    def __init__(self, path: Path, image_folder: Path) -> None:
        self._path = path
        self._image_folder = image_folder
        self._raw = read_samples(path)

    @property
    def valid_numbers(self) -> tuple[int, ...]:
        """None: the form has no place for it."""
        return ()

    def __len__(self) -> int:
        return len(self._raw)

    def sample(self, number: int) -> Sample:
        """See :class:`SampleSource`."""
        return parse_sample(self._raw[number], number)

    def image(self, name: str) -> Image.Image:
        """See :class:`SampleSource`."""
        return decode_image(self._image_folder / name)

    def facts(self) -> Iterator[bytes]:
        """The content of the list; name, size and time of every image."""
        yield hashlib.sha256(self._path.read_bytes()).digest()
        for name in self._image_names():
            yield file_facts(self._image_folder, name)

    def _image_names(self) -> list[str]:
        """Names of all images of samples that can be parsed, each once, sorted."""
        names: set[str] = set()
        for number in range(len(self)):
            try:
                names.update(self.sample(number).images)
            except DataError:  # Reported when the index is made; here it has no images to look at.
                continue
        return sorted(names)
