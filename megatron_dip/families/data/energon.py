"""Webdataset shards that megatron-energon has prepared, read and written.

A data set is a folder of tar files with a folder ``.nv-meta`` beside them.  A sample is the parts
of one key: ``json``, which holds ``conversations`` in LLaVA's form, and its images, every other
part, in the order of their marks::

    shard-000000.tar:  000000000.json 000000000.jpg  000000001.json 000000001.0.png 000000001.1.png

or an image with its caption, as img2dataset writes them: the part ``txt`` is then an answer to the
image alone, and ``json``, which need not be there, is what img2dataset says of the download::

    00000.tar:  000000000.jpg 000000000.txt 000000000.json  000000001.jpg 000000001.txt ...

Samples are numbered through the shards.  They are read one by one, through energon's index of the
shards, because a packed sequence is a function of its number here: that is what makes training go
on after a restart where it was.  Energon's own loader, with its shuffle buffers, blends of data
sets and state, is not used; the folder must be in a file system that every rank sees.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import batched, groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from megatron_dip.errors import DataError, shown
from megatron_dip.families.data.fields import check_object
from megatron_dip.families.data.files import file_facts, open_media
from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.samples import Sample, parse_sample, read_samples, sample_name
from megatron_dip.reading import decode_text, parse_json
from megatron_dip.text_form import IMAGE

__all__ = ["EnergonShards", "EnergonSummary", "write_energon"]

_META_FOLDER = ".nv-meta"
_META_FILES = ((".info.json", ".info.yaml"), ("index.sqlite",), ("split.yaml", "split.json"))
_TEXT_PART, _CAPTION_PART = "json", "txt"
_DATA_SET_FORM = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""
_MISSING = (
    "shards are read with the package megatron-energon, which is not installed; "
    "pip install 'megatron-dip[energon]'"
)


class _Part(NamedTuple):
    """A file in a shard."""

    shard: str
    size_bytes: int


class _Entry(NamedTuple):
    """A sample: names of its parts, in the order of the shard."""

    shard: str
    key: str
    names: tuple[str, ...]


class EnergonShards:
    """A :class:`SampleSource` over the splits ``train`` and ``val`` of a prepared data set."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            DataError: megatron-energon is not installed, or the folder is no data set of it.
        """
        self._folder = folder
        self._opened: tuple[int, Any] | None = None
        try:
            import megatron.energon  # noqa: F401
        except ImportError as error:
            raise DataError(f"{folder}: {_MISSING} ({error})") from error
        for names in _META_FILES:
            if not any((folder / _META_FOLDER / name).is_file() for name in names):
                raise DataError(
                    f"{folder}: no data set of megatron-energon, {_META_FOLDER}/{names[0]} is "
                    f"missing; make it with 'energon prepare' or scripts/make_energon_data.py"
                )
        try:
            self._parts, entries = self._list_parts()
            train, valid = self._shards_of("train"), self._shards_of("val")
        except Exception as error:  # Databases, YAML and energon's checks each raise their own.
            raise DataError(
                f"{folder}: what {_META_FOLDER} says cannot be used ({error}); prepare it again"
            ) from error
        self._entries = tuple(entry for entry in entries if entry.shard in train | valid)
        self.valid_numbers = tuple(
            number for number, entry in enumerate(self._entries) if entry.shard in valid
        )
        """The samples of the split ``val``."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return len(self._entries)

    def sample(self, number: int) -> Sample:
        """See :class:`SampleSource`; a sample without an id is called by its key."""
        entry = self._entries[number]
        texts = {f"{entry.key}.{part}" for part in (_TEXT_PART, _CAPTION_PART)}
        images = [name for name in entry.names if name not in texts]
        try:
            raw = {"id": entry.key, **self._read_texts(entry, images)}
            sample = parse_sample(raw | {"image": images}, number)
        except DataError as error:
            raise DataError(f"{entry.shard}: {error}") from error
        return replace(sample, name=f"{entry.shard}: {sample.name}")

    def image(self, name: str) -> Image.Image:
        """See :class:`SampleSource`."""
        return decode_image(self._folder / self._parts[name].shard / name, self._read(name))

    def facts(self) -> Iterator[bytes]:
        """Splits; size and time of every shard and of their index."""
        meta = self._folder / _META_FOLDER
        shards = sorted({entry.shard for entry in self._entries})
        for path in (meta / "index.sqlite", *(self._folder / shard for shard in shards)):
            yield file_facts(path.parent, path.name)
        yield repr((len(self), self.valid_numbers)).encode()

    def _read_texts(self, entry: _Entry, images: Sequence[str]) -> Mapping[str, Any]:
        """What a sample says, in LLaVA's form."""
        what = f"sample {shown(entry.key)}"
        said, caption = f"{entry.key}.{_TEXT_PART}", f"{entry.key}.{_CAPTION_PART}"
        raw: Mapping[str, Any] = {}
        if said in self._parts:
            source = f"{what}: {said}"
            text = self._read_part_as_text(said, source)
            parsed = parse_json(text, source, DataError, allow_repeated_keys=True)
            raw = check_object(parsed, source)
        if caption not in self._parts:
            if "conversations" not in raw:
                raise DataError(
                    f"{what}: has neither conversations in a part {_TEXT_PART!r} nor a caption in "
                    f"a part {_CAPTION_PART!r}, only {shown(list(entry.names))}"
                )
            return raw
        if "conversations" in raw:
            raise DataError(
                f"{what}: has conversations and a part {_CAPTION_PART!r}, which would not be "
                f"trained; remove one of them, or skip bad samples"
            )
        if not images:
            raise DataError(f"{what}: has a caption and no image, only {shown(list(entry.names))}")
        answer = self._read_part_as_text(caption, f"{what}: {caption}").strip()
        turns = (("human", IMAGE * len(images)), ("gpt", answer))
        return {"conversations": [{"from": role, "value": value} for role, value in turns]}

    def _read_part_as_text(self, name: str, source: str) -> str:
        return decode_text(self._read(name), source, DataError)

    def _read(self, name: str) -> bytes:
        """The content of a part.

        Raises:
            DataError: The shard is missing, broken or cut short.
        """
        part = self._parts[name]
        path = self._folder / part.shard
        try:
            content: bytes = self._store()[name][0]
        except Exception as error:  # Tar files, databases and file systems each raise their own.
            raise DataError(
                f"shard {path}: {name} cannot be read ({error}); replace the shard, or skip bad "
                f"samples"
            ) from error
        if len(content) != part.size_bytes:
            raise DataError(
                f"shard {path} is cut short: {name} has {len(content)} of {part.size_bytes} "
                f"bytes; replace the shard, or skip bad samples"
            )
        return content

    def _store(self) -> Any:
        """Energon's reader; each process has its own, because connections to databases are not
        for forked ones."""
        if self._opened is None or self._opened[0] != os.getpid():
            from megatron.energon.cache.file_store import WebdatasetFileStore
            from megatron.energon.epathlib import EPath

            self._opened = (os.getpid(), WebdatasetFileStore(EPath(self._folder)))
        return self._opened[1]

    def _list_parts(self) -> tuple[dict[str, _Part], list[_Entry]]:
        store = self._store()
        parts = {
            name: _Part(store.tar_filenames[shard], size)
            for name, size, shard in store.list_all_sample_parts()
        }

        def key_of(name: str) -> tuple[str, str]:
            folder, slash, file = name.rpartition("/")
            return parts[name].shard, f"{folder}{slash}{file.partition('.')[0]}"

        entries = [_Entry(*key, tuple(names)) for key, names in groupby(parts, key_of)]
        return parts, entries

    def _shards_of(self, split: str) -> set[str]:
        """The shards of a split; none where it is empty or only some of its samples are used."""
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
        from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

        try:
            meta = WebdatasetMeta.from_config(EPath(self._folder), split_part=split)
        except EmptyDatasetError:
            return set()
        if meta.sample_excludes:
            raise ValueError(f"{split} excludes single samples; leave out whole shards only")
        return {shard.name for shard in meta.shards}


class EnergonSummary(NamedTuple):
    """What was written."""

    num_samples: int
    num_images: int
    num_shards: int
    size_bytes: int


def write_energon(
    samples: Path,
    image_folder: Path,
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    num_valid_shards: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> EnergonSummary:
    """Put the samples of a list in LLaVA's form into shards, and prepare them.

    Their order stays, so that both give the same batches.

    Args:
        num_valid_shards: The last ones, as the split ``val``.
        advance: Called after every sample.

    Raises:
        DataError: megatron-energon is not installed, a sample is not in LLaVA's form, or its
            image cannot be read.
    """
    try:
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    except ImportError as error:
        raise DataError(f"{_MISSING} ({error})") from error
    raw_samples = read_samples(samples)
    folder.mkdir(parents=True, exist_ok=True)
    names, num_images, key = [], 0, 0
    for number, group in enumerate(batched(raw_samples, samples_per_shard)):
        names.append(f"shard-{number:06d}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for raw in group:
                num_images += _write_sample(tar, raw, key, image_folder)
                key += 1
                advance()
    if num_valid_shards >= len(names):
        raise DataError(
            f"{num_valid_shards} of {len(names)} shards for validation leave none to train on; "
            f"keep fewer, or put fewer samples into a shard"
        )
    num_train = len(names) - num_valid_shards
    splits = {"train": names[:num_train], "val": names[num_train:], "test": []}
    # Alternatives; of none, what never matches.
    patterns = [(split, f"({'|'.join(some) or '(?!)'})$") for split, some in splits.items()]
    # It tells what it does on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder,
            names,
            split_parts_patterns=patterns,
            workers=1,
        )
    (folder / _META_FOLDER / "dataset.yaml").write_text(_DATA_SET_FORM)
    size_bytes = sum((folder / name).stat().st_size for name in names)
    return EnergonSummary(len(raw_samples), num_images, len(names), size_bytes)


def _write_sample(tar: tarfile.TarFile, raw: Any, number: int, image_folder: Path) -> int:
    """Add one sample; returns its number of images."""
    images = parse_sample(raw, number).images
    contents = {_TEXT_PART: json.dumps(raw, ensure_ascii=False).encode()}
    for place, image in enumerate(images):
        ending = Path(image).suffix.lower().removeprefix(".")
        ending = ending if ending not in ("", _TEXT_PART, _CAPTION_PART) else "img"
        part = f"{place}.{ending}" if len(images) > 1 else ending
        try:
            with open_media(image_folder / image, "image") as file:
                contents[part] = file.read()
        except DataError as error:
            raise DataError(f"{sample_name(raw, number)}: {error}") from error
    for part, content in contents.items():
        # Nothing of the machine: the same samples give the same bytes.
        header = tarfile.TarInfo(f"{number:09d}.{part}")
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
    return len(images)
