"""What a microbatch of a vision-language model is, and the parts of it that a stage reads.

Items: one image is an item of ``vision``, one packed sequence an item of ``language``.  Images
are numbered through the microbatch, those of sequence 0 first.  All rows are packed: nothing is
padded unless ``padded`` is asked for.  Notation: T tokens, N patches, M image tokens, p pixels
per patch side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, Self, overload

import torch
from torch import Tensor

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.families.data.images import Grid, image_item
from megatron_dip.families.packed.batches import EncoderBatch, Microbatch, Movable, check_items
from megatron_dip.models.context_rows import rows_of_context_rank

__all__ = [
    "ImageData",
    "LanguageBatch",
    "PackedSequence",
    "VisionBatch",
    "VlmMicrobatch",
    "VlmWholeBatch",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """One image."""

    grid: Grid
    pixels: Tensor | None
    """``[rows * columns, 3 * p * p]`` float32, group-major; None where this rank needs none."""

    @property
    def num_patches(self) -> int:
        return self.grid.num_patches

    @property
    def num_tokens(self) -> int:
        """Language tokens after the merge."""
        return self.grid.num_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSequence:
    """Some samples one after another, L tokens in all, not padded."""

    tokens: Tensor
    """``[L]`` int64; the image token id where an image stands."""
    labels: Tensor
    """``[L]`` int64: the next token of the same span; 0 at the end of a span."""
    loss_mask: Tensor
    """``[L]`` float32: 1 where the label is to be learned."""
    span_lengths: tuple[int, ...]
    """Tokens of each sample; attention stays inside a span."""
    images: tuple[ImageData, ...]
    """In the order of their marks."""
    image_positions: Tensor
    """``[M]`` int64: the rows of ``tokens`` that features of the images replace, ascending."""
    padding: Tensor | None = None
    """``[L]`` bool: rows that only fill samples up; None where there are none."""

    def __post_init__(self) -> None:
        assert sum(self.span_lengths) == len(self.tokens) == len(self.labels) == len(self.loss_mask)
        assert len(self.image_positions) == self.num_media_rows

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_media_rows(self) -> int:
        """Rows of ``tokens`` that features replace."""
        return sum(image.num_tokens for image in self.images)

    def divisible(self, multiple: int) -> Self:
        """The same with every sample filled up to a multiple of ``multiple`` tokens, which have no
        loss and which no other token reads."""
        lengths = [-(-length // multiple) * multiple for length in self.span_lengths]
        starts = accumulate(lengths, initial=0)
        places = [
            torch.arange(first, first + length)
            for first, length in zip(starts, self.span_lengths, strict=False)
        ]
        rows = torch.cat(places)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(sum(lengths)).index_copy(0, rows, values)

        return replace(
            self,
            tokens=spread(self.tokens),
            labels=spread(self.labels),
            loss_mask=spread(self.loss_mask),
            span_lengths=tuple(lengths),
            image_positions=rows[self.image_positions],
            padding=~spread(torch.ones_like(self.tokens, dtype=torch.bool)),
        )

    def without_media(self) -> Self:
        """The same without pixels."""
        return replace(self, images=tuple(replace(image, pixels=None) for image in self.images))


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionBatch(EncoderBatch):
    """Some images of a microbatch."""

    in_weights_dtype = frozenset({"patches"})

    patches: Tensor | None
    """``[N, 3 * p * p]`` float32; None where this rank does not decode."""
    grids: tuple[Grid, ...]
    items: tuple[int, ...]
    """The numbers of the images, in the order of the rows."""

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """Patches of each image; attention stays inside an image."""
        return tuple(grid.num_patches for grid in self.grids)


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageBatch(Movable):
    """Some sequences of a microbatch, one after another."""

    tokens: Tensor
    """``[T]`` int64."""
    labels: Tensor
    """``[T]`` int64."""
    position_ids: Tensor
    """``[T]`` int64, from 0 in every span."""
    loss_mask: Tensor
    """``[T]`` float32."""
    span_lengths: tuple[int, ...]
    image_rows: Tensor
    """``[M]`` int64: the rows of T that image features replace."""
    images: tuple[int, ...]
    """The image items whose features, one after another, fill ``image_rows``."""
    items: tuple[int, ...]
    """The numbers of the sequences, in the order of the rows."""
    upstream_rows: tuple[int, ...] = ()
    """Of ``image_rows`` those that each of ``upstream_items`` fills, in their order."""
    media: tuple[tuple[str, int], ...] | None = None
    """Where not only images are read: module and item of all features that fill ``image_rows``."""
    padding: Tensor | None = None
    """``[T]`` bool: rows that only fill a sequence up; None where there are none."""
    num_context_ranks: int = 1
    """Ranks that have the rows of the spans; T is of one, ``span_lengths`` are of all."""
    feature_rows: Tensor | None = None
    """``[M]`` int64: of the features of ``upstream_items`` those that fill ``image_rows``, where
    others fall on rows of another rank; None where all are read."""

    @property
    def num_features(self) -> int:
        """Rows of the features of ``upstream_items``."""
        if self.feature_rows is None:
            return len(self.image_rows)
        return sum(self.upstream_rows)

    def on_context_rank(self, rank: int, num_ranks: int) -> "LanguageBatch":
        """What one of ``num_ranks`` has of the spans, whose lengths must divide for that.

        Raises:
            DataError: They do not.
        """
        rows = torch.tensor(rows_of_context_rank(self.span_lengths, num_ranks, rank))
        place = torch.full((len(self.tokens),), -1)
        place[rows] = torch.arange(len(rows))
        local = place[self.image_rows]
        features = (local >= 0).nonzero().flatten()
        return replace(
            self,
            tokens=self.tokens[rows],
            labels=self.labels[rows],
            position_ids=self.position_ids[rows],
            loss_mask=self.loss_mask[rows],
            image_rows=local[features],
            padding=None if self.padding is None else self.padding[rows],
            num_context_ranks=num_ranks,
            feature_rows=features,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def upstream_items(self) -> tuple[tuple[str, int], ...]:
        """The images, as items of ``vision``, or all media."""
        if self.media is not None:
            return self.media
        return tuple(("vision", image) for image in self.images)

    def padded_to(self, num_tokens: int) -> "LanguageBatch":
        """The same with one more span without loss, so that there are ``num_tokens`` rows."""
        missing = num_tokens - self.num_tokens
        if missing < 0:
            raise ValueError(f"{self.num_tokens} tokens cannot be padded to {num_tokens}")
        if missing == 0:
            return self
        zeros = self.tokens.new_zeros(missing)
        positions = torch.arange(missing, device=self.tokens.device)
        return replace(
            self,
            tokens=torch.cat([self.tokens, zeros]),
            labels=torch.cat([self.labels, zeros]),
            position_ids=torch.cat([self.position_ids, positions]),
            loss_mask=torch.cat([self.loss_mask, self.loss_mask.new_zeros(missing)]),
            span_lengths=(*self.span_lengths, missing),
            padding=torch.cat([self.is_padding, zeros == 0]),
        )

    @property
    def is_padding(self) -> Tensor:
        """``padding``, also where there is none."""
        return (
            torch.zeros_like(self.tokens, dtype=torch.bool)
            if self.padding is None
            else self.padding
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class VlmWholeBatch(Movable):
    """A microbatch for Megatron's own schedule: all images, and sequences of one fixed length."""

    vision: VisionBatch
    language: LanguageBatch

    @property
    def loss_mask(self) -> Tensor:
        """``[sequences * seq_length]`` float32."""
        return self.language.loss_mask


@dataclass(frozen=True, kw_only=True, eq=False)
class VlmMicrobatch(Microbatch):
    """The packed sequences of one microbatch."""

    sequences: tuple[PackedSequence, ...]
    values_per_patch: int = 0
    """3 * p * p: the width of a ``VisionBatch`` without images."""
    context_rank: int = 0
    num_context_ranks: int = 1
    """Ranks among which the rows of every sample are divided; media are whole on all of them."""

    @cached_property
    def images(self) -> tuple[ImageData, ...]:
        """All images; their places are their item numbers."""
        return tuple(image for sequence in self.sequences for image in sequence.images)

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """Per sequence, the numbers of its images."""
        ends = list(accumulate(len(sequence.images) for sequence in self.sequences))
        return tuple(
            tuple(range(end - len(sequence.images), end))
            for sequence, end in zip(self.sequences, ends, strict=True)
        )

    def metadata(self) -> ItemSizes:
        """Patches of every image, tokens of every sequence and the images that it reads."""
        return {
            "vision": [image_item(image.grid) for image in self.images],
            "language": [
                ItemSize(
                    tokens=sequence.num_tokens,
                    spans=sequence.span_lengths,
                    needs={"vision": images},
                    loss_tokens=int(sequence.loss_mask.sum()),
                    context_loss_tokens=self._loss_tokens(sequence),
                )
                for sequence, images in zip(self.sequences, self.needs, strict=True)
            ],
        }

    @overload
    def sub_batch(self, module: Literal["vision"], items: Sequence[int]) -> VisionBatch: ...
    @overload
    def sub_batch(self, module: Literal["language"], items: Sequence[int]) -> LanguageBatch: ...
    @overload
    def sub_batch(self, module: str, items: Sequence[int]) -> VisionBatch | LanguageBatch: ...
    def sub_batch(self, module: str, items: Sequence[int]) -> VisionBatch | LanguageBatch:
        """The given items of a module, in the given order.

        Raises:
            ValueError: No such module, or an item number that the microbatch does not have.
        """
        counts = {"vision": len(self.images), "language": len(self.sequences)}
        check_items(module, items, counts)
        if module == "vision":
            return self._vision_batch(items)
        joined = self._join([self._one_sequence(item) for item in items])
        if self.num_context_ranks == 1:
            return joined
        return joined.on_context_rank(self.context_rank, self.num_context_ranks)

    def _loss_tokens(self, sequence: PackedSequence) -> tuple[int, ...]:
        """Of every context-parallel rank; empty where there is one."""
        if self.num_context_ranks == 1:
            return ()
        rows = [
            rows_of_context_rank(sequence.span_lengths, self.num_context_ranks, rank)
            for rank in range(self.num_context_ranks)
        ]
        return tuple(int(sequence.loss_mask[own].sum()) for own in rows)

    @cached_property
    def without_media(self) -> Self:
        """See :class:`Microbatch`."""
        return replace(self, sequences=tuple(one.without_media() for one in self.sequences))

    def padded(self, seq_length: int) -> LanguageBatch:
        """All sequences, each filled up to ``seq_length`` by one more span without loss.

        This is what a schedule with fixed shapes needs: ``len(sequences) * seq_length`` rows.

        Raises:
            ValueError: A sequence is longer than ``seq_length``.
        """
        items = range(len(self.sequences))
        return self._join([self._one_sequence(item).padded_to(seq_length) for item in items])

    def whole(self, seq_length: int) -> VlmWholeBatch:
        """See :class:`Microbatch`; every sequence is padded to ``seq_length``."""
        return VlmWholeBatch(
            vision=self.sub_batch("vision", range(len(self.images))),
            language=self.padded(seq_length),
        )

    def _vision_batch(self, items: Sequence[int]) -> VisionBatch:
        images = [self.images[item] for item in items]
        pixels = [image.pixels for image in images if image.pixels is not None]
        if not images:
            patches: Tensor | None = torch.empty(0, self.values_per_patch)
        else:
            assert len(pixels) in (0, len(images)), "a rank decodes all of its images or none"
            patches = torch.cat(pixels) if pixels else None
        grids = tuple(image.grid for image in images)
        return VisionBatch(patches=patches, grids=grids, items=tuple(items))

    def _one_sequence(self, item: int) -> LanguageBatch:
        sequence = self.sequences[item]
        positions = [torch.arange(length) for length in sequence.span_lengths]
        return LanguageBatch(
            tokens=sequence.tokens,
            labels=sequence.labels,
            position_ids=_concatenate(positions, torch.int64),
            loss_mask=sequence.loss_mask,
            span_lengths=sequence.span_lengths,
            image_rows=sequence.image_positions,
            images=self.needs[item],
            padding=sequence.padding,
            upstream_rows=tuple(image.num_tokens for image in sequence.images),
            items=(item,),
        )

    def _join(self, parts: Sequence[LanguageBatch]) -> LanguageBatch:
        starts = accumulate((part.num_tokens for part in parts), initial=0)
        rows = [part.image_rows + start for part, start in zip(parts, starts, strict=False)]
        return LanguageBatch(
            tokens=_concatenate([part.tokens for part in parts], torch.int64),
            labels=_concatenate([part.labels for part in parts], torch.int64),
            position_ids=_concatenate([part.position_ids for part in parts], torch.int64),
            loss_mask=_concatenate([part.loss_mask for part in parts], torch.float32),
            span_lengths=tuple(length for part in parts for length in part.span_lengths),
            image_rows=_concatenate(rows, torch.int64),
            images=tuple(image for part in parts for image in part.images),
            upstream_rows=tuple(rows for part in parts for rows in part.upstream_rows),
            items=tuple(item for part in parts for item in part.items),
            padding=None
            if all(part.padding is None for part in parts)
            else torch.cat([part.is_padding for part in parts]),
        )


def _concatenate(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype)
