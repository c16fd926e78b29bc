"""Microbatches of LaVIN: packed sequences that begin with the modality rows of their samples.

Items: one image is an item of ``vision``, one packed sequence an item of ``language``.  The rows
of a sequence of k samples are k modality rows, each a span of its own, and then the samples.
Notation: T rows, P rows of an image in the vision tower, F feature rows that an image becomes.

Every supervised token has a weight.  With the loss per token all weights are 1 and a microbatch has
as many *loss units* as supervised tokens.  With the mean of means (published) a token weighs
m / n, where n are the supervised tokens among the m samples that the published sampler puts into
one microbatch, and every sample is a unit.  Either way the loss is the weighted sum over the units,
however samples are packed, split and scheduled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.families.packed.batches import EncoderBatch, Microbatch, Movable, check_items
from megatron_dip.families.vlm.batches import LanguageBatch

__all__ = [
    "ClipBatch",
    "ImageSize",
    "LavinMicrobatch",
    "LavinWholeBatch",
    "RoutedBatch",
    "RoutedSequence",
]


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """What every image becomes; all have the same size."""

    num_patches: int
    values_per_patch: int
    num_features: int
    """Rows of the language module that stand for an image."""

    @property
    def num_rows(self) -> int:
        """Rows in the vision tower: the class row and the patches."""
        return 1 + self.num_patches

    @property
    def item(self) -> ItemSize:
        """The size of an image as an item of the vision module."""
        rows = self.num_rows
        return ItemSize(tokens=rows, spans=(rows,), output_tokens=self.num_features)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedSequence:
    """Some samples one after another, their modality rows first; not padded."""

    tokens: Tensor
    """``[T]`` int64; 0 where a row stands for no word."""
    labels: Tensor
    """``[T]`` int64: the next token of the same sample; 0 at its end."""
    weights: Tensor
    """``[T]`` float32: of the loss at each row; 0 where nothing is learned."""
    num_loss_units: int
    sample_lengths: tuple[int, ...]
    """Rows of each sample, image rows among them, its modality row not."""
    modalities: tuple[int, ...]
    """Per sample: 0 text, 1 image."""
    image_rows: Tensor
    """``[M]`` int64, ascending: rows that stand for images, F for each."""
    images: tuple[Tensor | None, ...]
    """Patches ``[P - 1, values]`` of each image, None where this rank needs none."""
    has_features: tuple[bool, ...]
    """Per image: whether the sequence reads it.  One that it does not read is there for what it
    does to others in the batch, under the released router only."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.labels) == len(self.weights) == self.num_rows
        assert len(self.modalities) == len(self.sample_lengths)

    @property
    def num_rows(self) -> int:
        return len(self.sample_lengths) + sum(self.sample_lengths)

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """Attention stays inside a span: nothing attends to a modality row but itself."""
        return (1,) * len(self.sample_lengths) + self.sample_lengths


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipBatch(EncoderBatch):
    """Some images of a microbatch."""

    in_weights_dtype = frozenset({"patches"})

    patches: Tensor | None
    """``[n, P - 1, values]`` float32; None where this rank does not decode."""
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedBatch(LanguageBatch):
    """Some sequences of a microbatch, one after another; ``loss_mask`` holds the weights."""

    modality_rows: Tensor
    """``[R]`` int64, ascending."""
    modalities: Tensor
    """``[R]`` int64: rows of the modality table."""
    gate_of_row: Tensor
    """``[T]`` int64: the place in ``modality_rows`` of each row's sample."""
    num_loss_units: int
    """Of this part of the microbatch."""

    def padded_to(self, num_tokens: int) -> "RoutedBatch":
        """The same with one more span without loss, which follows the first sample's gate."""
        base = super().padded_to(num_tokens)
        assert isinstance(base, RoutedBatch)
        missing = base.num_tokens - self.num_tokens
        zeros = self.gate_of_row.new_zeros(missing)
        return replace(base, gate_of_row=torch.cat([self.gate_of_row, zeros]))


@dataclass(frozen=True, kw_only=True, eq=False)
class LavinWholeBatch(Movable):
    """A microbatch for Megatron's own schedule: all images, and sequences of one fixed length."""

    vision: ClipBatch
    language: RoutedBatch
    wanted: tuple[int, ...] | None
    """The images whose features are read, where those are not all."""

    @property
    def loss_mask(self) -> Tensor:
        """``[sequences * seq_length]`` float32."""
        return self.language.loss_mask

    @property
    def num_loss_units(self) -> int:
        """What the sum of the weighted losses is divided by."""
        return self.language.num_loss_units


@dataclass(frozen=True, kw_only=True, eq=False)
class LavinMicrobatch(Microbatch):
    """The sequences of one microbatch."""

    sequences: tuple[RoutedSequence, ...]
    image_size: ImageSize

    @cached_property
    def images(self) -> tuple[Tensor | None, ...]:
        """All images; their places are their item numbers."""
        return tuple(image for sequence in self.sequences for image in sequence.images)

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """Per sequence, the numbers of the images that it reads."""
        starts = accumulate((len(sequence.images) for sequence in self.sequences), initial=0)
        return tuple(
            tuple(start + place for place, read in enumerate(sequence.has_features) if read)
            for start, sequence in zip(starts, self.sequences, strict=False)
        )

    def metadata(self) -> ItemSizes:
        """Rows of every image, rows of every sequence and the images that it reads."""
        return {
            "vision": [self.image_size.item] * len(self.images),
            "language": [
                ItemSize(
                    tokens=sequence.num_rows,
                    spans=sequence.span_lengths,
                    needs={"vision": images},
                    loss_tokens=sequence.num_loss_units,
                )
                for sequence, images in zip(self.sequences, self.needs, strict=True)
            ],
        }

    def sub_batch(self, module: str, items: Sequence[int]) -> ClipBatch | RoutedBatch:
        """The given items of a module, in the given order.

        Raises:
            ValueError: No such module, or an item number that the microbatch does not have.
        """
        counts = {"vision": len(self.images), "language": len(self.sequences)}
        check_items(module, items, counts)
        if module == "vision":
            return self.clip_batch(items)
        return _join([self._one_sequence(item) for item in items])

    def clip_batch(self, items: Sequence[int]) -> ClipBatch:
        """The given images."""
        chosen = [self.images[item] for item in items]
        pixels = [image for image in chosen if image is not None]
        assert len(pixels) in (0, len(chosen)), "a rank decodes all of its images or none"
        if not chosen:
            size = self.image_size
            patches: Tensor | None = torch.empty(0, size.num_patches, size.values_per_patch)
        else:
            patches = torch.stack(pixels) if pixels else None
        return ClipBatch(patches=patches, items=tuple(items))

    @cached_property
    def without_media(self) -> Self:
        """See :class:`Microbatch`."""
        return replace(
            self,
            sequences=tuple(
                replace(one, images=(None,) * len(one.images)) for one in self.sequences
            ),
        )

    def whole(self, seq_length: int) -> "LavinWholeBatch":
        """See :class:`Microbatch`; every sequence is padded to ``seq_length``.

        Raises:
            ValueError: A sequence is longer than ``seq_length``.
        """
        items = range(len(self.sequences))
        parts = [self._one_sequence(item).padded_to(seq_length) for item in items]
        wanted = [image for images in self.needs for image in images]
        return LavinWholeBatch(
            vision=self.clip_batch(range(len(self.images))),
            language=_join(parts),
            wanted=None if len(wanted) == len(self.images) else tuple(wanted),
        )

    def _one_sequence(self, item: int) -> RoutedBatch:
        sequence = self.sequences[item]
        lengths = torch.tensor(sequence.sample_lengths)
        places = torch.arange(len(lengths))
        return RoutedBatch(
            tokens=sequence.tokens,
            labels=sequence.labels,
            position_ids=torch.cat([torch.arange(length) for length in sequence.span_lengths]),
            loss_mask=sequence.weights,
            span_lengths=sequence.span_lengths,
            image_rows=sequence.image_rows,
            images=self.needs[item],
            upstream_rows=(self.image_size.num_features,) * len(self.needs[item]),
            items=(item,),
            modality_rows=places,
            modalities=torch.tensor(sequence.modalities),
            gate_of_row=torch.cat([places, places.repeat_interleave(lengths)]),
            num_loss_units=sequence.num_loss_units,
        )


def _join(parts: Sequence[RoutedBatch]) -> RoutedBatch:
    starts = list(accumulate((part.num_tokens for part in parts), initial=0))
    gates = list(accumulate((len(part.modality_rows) for part in parts), initial=0))

    def joined(name: str, offsets: Sequence[int] | None = None) -> Tensor:
        values = [getattr(part, name) for part in parts]
        if offsets is not None:
            values = [value + offset for value, offset in zip(values, offsets, strict=False)]
        return torch.cat(values)

    return RoutedBatch(
        tokens=joined("tokens"),
        labels=joined("labels"),
        position_ids=joined("position_ids"),
        loss_mask=joined("loss_mask"),
        span_lengths=tuple(length for part in parts for length in part.span_lengths),
        image_rows=joined("image_rows", starts),
        images=tuple(image for part in parts for image in part.images),
        upstream_rows=tuple(rows for part in parts for rows in part.upstream_rows),
        items=tuple(item for part in parts for item in part.items),
        modality_rows=joined("modality_rows", starts),
        modalities=joined("modalities"),
        gate_of_row=joined("gate_of_row", gates),
        num_loss_units=sum(part.num_loss_units for part in parts),
    )
