"""The data set of LaVIN's sequences, packed or one sample each, with the weights of their losses.

Sequence ``i`` is a pure function of the data, the settings and ``(seed, i)``, as in ``VlmDataset``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.errors import DataError
from megatron_dip.families.data.index import check_bad_samples
from megatron_dip.families.data.packing import PackedEpochs, PackingOptions, pack_epoch
from megatron_dip.families.data.stand_ins import StandIns
from megatron_dip.families.data.tokenizer import load_tokenizer
from megatron_dip.families.lavin.batches import ImageSize, LavinMicrobatch, RoutedSequence
from megatron_dip.families.lavin.images import load_patches
from megatron_dip.families.lavin.instructions import (
    EncodedInstruction,
    Instruction,
    encode_instruction,
)
from megatron_dip.text_form import OUR_TEXT_FORM, TextForm

__all__ = ["LavinDataset", "LavinSettings", "LossMode", "with_blank_images"]

LossMode = Literal["mean_of_means", "per_token"]
"""``mean_of_means`` (published): the mean over microbatches of the mean over their supervised
tokens; ``per_token``: the mean over all supervised tokens."""


@dataclass(frozen=True, kw_only=True)
class LavinSettings:
    """How samples become sequences."""

    tokenizer: Path
    image_folder: Path
    image_size: int
    patch_size: int
    num_features: int
    seq_length: int
    """Most rows of a sequence, modality rows among them."""
    packing: PackingOptions | None = None
    """How samples share sequences; one sample in each where not given."""
    loss: LossMode = "mean_of_means"
    samples_per_mean: int = 4
    """Samples over whose tokens the published code takes one mean: its microbatch."""
    text_form: TextForm = OUR_TEXT_FORM
    """How texts are written for the tokenizer."""
    fills_blank_images: bool = False
    """Give samples of text an empty image where others in the microbatch have one: the released
    router's gates depend on it."""

    @property
    def size(self) -> ImageSize:
        """What every image becomes."""
        return ImageSize(
            num_patches=(self.image_size // self.patch_size) ** 2,
            values_per_patch=3 * self.patch_size**2,
            num_features=self.num_features,
        )


class Member(NamedTuple):
    """A sample of a sequence: in each epoch it may have another weight."""

    epoch: int
    number: int
    """Its place among the samples."""


class LavinDataset(Dataset[RoutedSequence]):
    """``num_samples`` sequences over as many epochs as they take.

    A *sample* of Megatron's counters is one sequence here.
    """

    def __init__(
        self,
        settings: LavinSettings,
        samples: Sequence[Instruction],
        *,
        errors: Sequence[str] = (),
        num_samples: int | None,
        seed: int,
        decode_images: bool = True,
        skip_bad_samples: bool = False,
        source: str = "data set",
    ) -> None:
        """
        Args:
            samples: Those that can be read.
            errors: Why others cannot.
            num_samples: Sequences in all; None for those of one epoch.
            decode_images: Whether this rank needs pixels.
            skip_bad_samples: Leave bad samples out instead of refusing the data set.
            source: Where the samples come from, for messages.

        Raises:
            DataError: There are bad samples and they are not to be skipped, or no other ones.
        """
        self.settings = settings
        self.seed = seed
        self.decode_images = decode_images
        self._samples, self._encoded = _encode(settings, samples, errors, skip_bad_samples, source)
        self._epochs = PackedEpochs(self._pack)
        self._num_samples = self._epochs.first_length if num_samples is None else num_samples
        self._weights: dict[int, tuple[float, ...]] = {}
        self._stand_ins = StandIns(allowed=skip_bad_samples)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, i: int | tuple[Member, ...]) -> RoutedSequence:
        """
        Args:
            i: The number of a sequence, or the samples of another one, as :meth:`members` has them.

        Raises:
            DataError: An image went bad since the index was made; see ``StandIns``.
        """
        members = self.members(i) if isinstance(i, int) else i
        numbers = [member.number for member in members]
        weights = [self._sample_weights(member.epoch)[member.number] for member in members]
        return _join_samples(
            [self._encoded[number] for number in numbers],
            [self._load(number) for number in numbers],
            weights,
            num_loss_units=len(numbers)
            if self.settings.loss == "mean_of_means"
            else sum(self._encoded[number].num_learned for number in numbers),
        )

    def collate_fn(self, sequences: Sequence[RoutedSequence]) -> LavinMicrobatch:
        """The sequences of one microbatch together."""
        if self.settings.fills_blank_images and any(sequence.images for sequence in sequences):
            filler = self._blank() if self.decode_images else None
            sequences = [with_blank_images(sequence, filler) for sequence in sequences]
        return LavinMicrobatch(sequences=tuple(sequences), image_size=self.settings.size)

    def sample_numbers(self, i: int) -> tuple[int, ...]:
        """The places of the samples in sequence ``i``; no image is read."""
        return self._epochs.place(i)[1]

    @property
    def room(self) -> int | None:
        """Most rows of a sequence; None where each is one sample."""
        return None if self.settings.packing is None else self.settings.seq_length

    def members(self, i: int) -> tuple[Member, ...]:
        """The samples in sequence ``i``, any of which may be packed into another one."""
        if not 0 <= i < self._num_samples:
            raise IndexError(f"no sequence {i}: the data set has {self._num_samples}")
        epoch, numbers = self._epochs.place(i)
        return tuple(Member(epoch, number) for number in numbers)

    def member_sizes(self, member: Member) -> ItemSizes:
        """The image and the rows of a sample; no file is read."""
        num_rows = _num_rows(self._encoded[member.number])
        has_image = self._samples[member.number].image is not None
        return {
            "vision": [self.settings.size.item] * has_image,
            # The modality row reads itself alone.
            "language": [ItemSize(tokens=num_rows, spans=(1, num_rows - 1))],
        }

    def _pack(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        if self.settings.packing is None:
            return tuple((number,) for number in self._order(epoch))
        return pack_epoch(
            [_num_rows(sample) for sample in self._encoded],
            [sample.image is not None for sample in self._samples],
            seq_length=self.settings.seq_length,
            seed=self.seed,
            epoch=epoch,
            options=self.settings.packing,
        )

    def _order(self, epoch: int) -> list[int]:
        """In which the published sampler goes through the samples: shuffled in every epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._samples))
        return [int(number) for number in order]

    def _sample_weights(self, epoch: int) -> tuple[float, ...]:
        """Per sample, the weight of each of its supervised tokens."""
        if self.settings.loss == "per_token":
            return (1.0,) * len(self._samples)
        if epoch not in self._weights:
            self._weights = {e: w for e, w in self._weights.items() if abs(e - epoch) <= 1}
            order, count = self._order(epoch), self.settings.samples_per_mean
            weights = [0.0] * len(order)
            for start in range(0, len(order), count):
                group = order[start : start + count]
                tokens = sum(self._encoded[number].num_learned for number in group)
                for number in group:
                    weights[number] = len(group) / tokens
            self._weights[epoch] = tuple(weights)
        return self._weights[epoch]

    def _load(self, number: int) -> Tensor | None:
        sample = self._samples[number]
        image = sample.image
        if image is None or not self.decode_images:
            return None
        return self._stand_ins.read(
            sample.name,
            lambda: load_patches(
                self.settings.image_folder / image,
                image_size=self.settings.image_size,
                patch_size=self.settings.patch_size,
            ),
            self._blank,
        )

    def _blank(self) -> Tensor:
        size = self.settings.size
        return torch.zeros(size.num_patches, size.values_per_patch)


def _num_rows(sample: EncodedInstruction) -> int:
    """With its modality row."""
    return 1 + len(sample.tokens)


def _encode(
    settings: LavinSettings,
    samples: Sequence[Instruction],
    errors: Sequence[str],
    skip_bad_samples: bool,
    source: str,
) -> tuple[tuple[Instruction, ...], tuple[EncodedInstruction, ...]]:
    tokenizer = load_tokenizer(settings.tokenizer, settings.text_form)
    good: list[tuple[Instruction, EncodedInstruction]] = []
    bad = list(errors)
    for sample in samples:
        try:
            encoded = encode_instruction(
                sample,
                tokenizer,
                num_features=settings.num_features,
                max_rows=settings.seq_length - 1,
            )
        except DataError as error:
            bad.append(str(error))
            continue
        good.append((sample, encoded))
    check_bad_samples(source, bad, len(good), skip_bad_samples=skip_bad_samples)
    return tuple(sample for sample, _ in good), tuple(encoded for _, encoded in good)


def _join_samples(
    samples: Sequence[EncodedInstruction],
    images: Sequence[Tensor | None],
    weights: Sequence[float],
    *,
    num_loss_units: int,
) -> RoutedSequence:
    """One sequence; a label is the next token of the same sample, the last of one has none."""
    count = len(samples)
    tokens, labels, row_weights = [0] * count, [0] * count, [0.0] * count
    image_rows: list[int] = []
    for sample, weight in zip(samples, weights, strict=True):
        image_rows += [len(tokens) + row for row in sample.image_rows]
        tokens += sample.tokens
        labels += [*sample.tokens[1:], 0]
        row_weights += [weight if learned else 0.0 for learned in (*sample.learned[1:], False)]
    return RoutedSequence(
        tokens=torch.tensor(tokens),
        labels=torch.tensor(labels),
        weights=torch.tensor(row_weights, dtype=torch.float32),
        num_loss_units=num_loss_units,
        sample_lengths=tuple(len(sample.tokens) for sample in samples),
        modalities=tuple(int(bool(sample.image_rows)) for sample in samples),
        image_rows=torch.tensor(image_rows, dtype=torch.int64),
        images=tuple(
            image for sample, image in zip(samples, images, strict=True) if sample.image_rows
        ),
        has_features=tuple(True for sample in samples if sample.image_rows),
    )


def with_blank_images(sequence: RoutedSequence, blank: Tensor | None) -> RoutedSequence:
    """``sequence`` with ``blank`` for every sample of text, which none of them reads."""
    images = iter(sequence.images)
    filled = [next(images) if modality else blank for modality in sequence.modalities]
    return replace(
        sequence,
        images=tuple(filled),
        has_features=tuple(bool(modality) for modality in sequence.modalities),
    )
