"""The data set of packed sequences that Megatron's samplers index.

Sequence ``i`` is a pure function of the data, the settings and ``(seed, i)``: training that goes
on after a restart by its number of consumed samples sees exactly what it would have seen.

Megatron's ``build_pretraining_data_loader`` (0.19) gives its ``DataLoader`` no ``collate_fn``,
so the caller sets ``loader.collate_fn = dataset.collate_fn`` before it is first iterated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import Dataset

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.errors import DataError
from megatron_dip.families.data.images import NUM_CHANNELS, Grid, blank_patches, image_item
from megatron_dip.families.data.index import (
    DataIndex,
    ImageRecord,
    recorded_patches,
    usable_samples,
)
from megatron_dip.families.data.packing import PackedEpochs, PackingOptions, pack_epoch
from megatron_dip.families.data.samples import EncodedText, encode_text
from megatron_dip.families.data.sources import DataSettings, SampleSource, open_source
from megatron_dip.families.data.stand_ins import StandIns
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.vlm.batches import ImageData, PackedSequence, VlmMicrobatch

__all__ = ["UNDIVIDED", "Division", "VlmDataset", "collate", "pack_sequence"]


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the rows of samples are divided among context-parallel ranks."""

    rank: int = 0
    num_ranks: int = 1
    multiple: int = 1
    """Of which every sample has tokens, so that all ranks that share rows have as many."""


UNDIVIDED = Division()
"""Where there is one context-parallel rank."""


def collate[Batch: VlmMicrobatch](
    sequences: Sequence[PackedSequence],
    *,
    make: Callable[..., Batch],
    values_per_patch: int,
    division: Division,
) -> Batch:
    """The sequences of one microbatch together, in the family's form ``make``."""
    if division.num_ranks > 1:
        sequences = [sequence.divisible(division.multiple) for sequence in sequences]
    return make(
        sequences=tuple(sequences),
        values_per_patch=values_per_patch,
        context_rank=division.rank,
        num_context_ranks=division.num_ranks,
    )


def pack_sequence(
    samples: Sequence[tuple[EncodedText, Sequence[ImageData]]], image_id: int
) -> PackedSequence:
    """One sequence from whole samples, whose image tokens are already expanded.

    A label is the next token of the same span; the last token of a span has none (0, no loss).
    """
    tokens: list[int] = []
    labels: list[int] = []
    learned: list[bool] = []
    for text, _ in samples:
        tokens += text.tokens
        labels += [*text.tokens[1:], 0]
        learned += [*text.trained[1:], False]
    token_rows = torch.tensor(tokens, dtype=torch.int64)
    return PackedSequence(
        tokens=token_rows,
        labels=torch.tensor(labels, dtype=torch.int64),
        loss_mask=torch.tensor(learned, dtype=torch.float32),
        span_lengths=tuple(len(text.tokens) for text, _ in samples),
        images=tuple(image for _, images in samples for image in images),
        image_positions=(token_rows == image_id).nonzero().flatten(),
    )


class VlmDataset(Dataset[PackedSequence]):
    """``num_samples`` packed sequences over as many epochs as they take.

    A *sample* of Megatron's counters is one packed sequence here.
    """

    def __init__(
        self,
        settings: DataSettings,
        index: DataIndex,
        *,
        num_samples: int | None,
        seed: int,
        decode_images: bool = True,
        skip_bad_samples: bool = False,
        packing: PackingOptions | None = None,
        subset: Sequence[int] | None = None,
        source: SampleSource | None = None,
        division: Division = UNDIVIDED,
    ) -> None:
        """
        Args:
            num_samples: Packed sequences in all; None for those of one epoch.
            decode_images: Whether this rank needs pixels; grids are known without.
            skip_bad_samples: Leave bad samples out instead of refusing the data set.
            subset: Numbers of the samples to use, e.g. from ``split_samples``; default all.
            source: What ``settings`` name, where it is open already.
            division: Of the rows of samples; sequences are packed as without it.

        Raises:
            DataError: The files cannot be read, do not belong to the index, or hold bad samples.
        """
        self.settings = settings
        self.index = index
        self.seed = seed
        self.decode_images = decode_images
        self.tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
        self._packing = packing or PackingOptions()
        self._source = source or open_source(settings)
        if len(self._source) != len(index.samples):
            raise DataError(
                f"{settings.samples} holds {len(self._source)} samples, its index "
                f"{len(index.samples)}; make the index again with build_index"
            )
        self._numbers = usable_samples(index, skip_bad_samples=skip_bad_samples, subset=subset)
        chosen = [index.samples[number] for number in self._numbers]
        self._lengths = [sample.num_tokens for sample in chosen]
        self._has_images = [bool(sample.images) for sample in chosen]
        self._epochs = PackedEpochs(self._pack)
        self._num_samples = self._epochs.first_length if num_samples is None else num_samples
        self._stand_ins = StandIns(allowed=skip_bad_samples)
        values_per_patch = NUM_CHANNELS * settings.patch_size**2
        self.collate_fn = partial(
            collate, make=VlmMicrobatch, values_per_patch=values_per_patch, division=division
        )
        """Puts the sequences of a microbatch together: give it to the data loader."""

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int | tuple[int, ...]) -> PackedSequence:
        """
        Args:
            i: The number of a sequence, or the samples of another one, as :meth:`members` has them.

        Raises:
            DataError: An image went bad since the index was made; see ``StandIns``.
        """
        numbers = self.members(i) if isinstance(i, int) else i
        return pack_sequence([self._load(number) for number in numbers], self.tokenizer.image_id)

    @property
    def room(self) -> int:
        """Most tokens of a sequence."""
        return self.settings.seq_length

    def members(self, i: int) -> tuple[int, ...]:
        """The samples in sequence ``i``, any of which may be packed into another one."""
        return self.sample_numbers(i)

    def member_sizes(self, member: int) -> ItemSizes:
        """The images and the tokens of a sample; no file is read."""
        record = self.index.samples[member]
        return {
            "vision": [image_item(image.grid) for image in record.images],
            "language": [ItemSize(tokens=record.num_tokens, spans=(record.num_tokens,))],
        }

    def sample_numbers(self, i: int) -> tuple[int, ...]:
        """The samples in sequence ``i``, as their places in the file; no image is read."""
        if not 0 <= i < self._num_samples:
            raise IndexError(f"no packed sequence {i}: the data set has {self._num_samples}")
        _, places = self._epochs.place(i)
        return tuple(self._numbers[place] for place in places)

    def grids(self, i: int) -> tuple[Grid, ...]:
        """The grids of the images of sequence ``i``; no image is read."""
        numbers = self.sample_numbers(i)
        return tuple(image.grid for n in numbers for image in self.index.samples[n].images)

    def _pack(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        return pack_epoch(
            self._lengths,
            self._has_images,
            seq_length=self.settings.seq_length,
            seed=self.seed,
            epoch=epoch,
            options=self._packing,
        )

    def _load(self, number: int) -> tuple[EncodedText, list[ImageData]]:
        try:
            sample = self._source.sample(number)
        except DataError as error:
            raise DataError(f"{self.index.source}: {error}") from error
        records = self.index.samples[number].images
        place = f"{self.index.source}: {sample.name}"
        images = [self._image(place, n, r) for n, r in zip(sample.images, records, strict=True)]
        sizes = [record.grid.num_tokens for record in records]
        image_id = self.tokenizer.image_id
        return encode_text(sample, self.tokenizer).expand(image_id, sizes), images

    def _image(self, place: str, name: str, record: ImageRecord) -> ImageData:
        if not self.decode_images:
            return ImageData(grid=record.grid, pixels=None)
        patch_size = self.settings.patch_size
        pixels = self._stand_ins.read(
            place,
            lambda: recorded_patches(self._source.image(name), name, record, patch_size),
            lambda: blank_patches(record.grid, patch_size),
        )
        return ImageData(grid=record.grid, pixels=pixels)
