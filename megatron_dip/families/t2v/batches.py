"""What a microbatch of clips with captions is, and the parts of it that a stage reads.

Items: a caption is an item of ``text``, a clip one of ``dit``; clip k reads caption k.  Notation: N
patches and M tokens of text in C clips, V values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from megatron_dip.costs import ItemSize, ItemSizes
from megatron_dip.families.packed.batches import EncoderBatch, Microbatch, Movable, check_items

__all__ = ["Clip", "ClipMicrobatch", "DitBatch", "TextBatch", "WholeClips", "clip_items"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One clip with its caption, and the point on its way to noise that is learned this time."""

    tokens: Tensor
    """``[L]`` int64: the caption."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches."""
    time: float
    """From 0, the clip, to 1, noise."""
    latents: Tensor | None
    """``[N, V]`` float32; None on ranks that hold neither end of the transformer."""
    noise: Tensor | None
    """``[N, V]`` float32, likewise."""

    @property
    def num_patches(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns


def clip_items(num_tokens: int, num_patches: int, number: int = 0) -> dict[str, ItemSize]:
    """The items of a clip, by module.

    Args:
        num_tokens: Of the caption.
        num_patches: Of the clip.
        number: Of the clip in its microbatch.
    """
    return {
        "text": ItemSize(tokens=num_tokens, spans=(num_tokens,)),
        "dit": ItemSize(
            tokens=num_patches,
            spans=(num_patches,),
            context_tokens=num_tokens,
            needs={"text": (number,)},
            loss_tokens=num_patches,
        ),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class TextBatch(EncoderBatch):
    """Some captions of a microbatch."""

    tokens: Tensor
    """``[M]`` int64."""
    position_ids: Tensor
    """``[M]`` int64, from 0 in every caption."""
    span_lengths: tuple[int, ...]
    items: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class DitBatch(Movable):
    """Some clips of a microbatch."""

    in_weights_dtype = frozenset({"inputs"})

    inputs: Tensor | None
    """``[N, V]`` float32, ``(1 - t) x + t e``; None where this rank has no latents."""
    targets: Tensor | None
    """``[N, V]`` float32, ``e - x``, likewise."""
    times: Tensor
    """``[C]`` float32."""
    loss_mask: Tensor
    """``[N]`` float32: every patch counts."""
    grids: tuple[tuple[int, int, int], ...]
    text_lengths: tuple[int, ...]
    """Tokens of text that each clip reads."""
    items: tuple[int, ...]

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """Patches of each clip; attention stays inside a clip."""
        return tuple(frames * rows * columns for frames, rows, columns in self.grids)

    @property
    def upstream_items(self) -> tuple[tuple[str, int], ...]:
        """The captions, as items of ``text``."""
        return tuple(("text", item) for item in self.items)

    @property
    def upstream_rows(self) -> tuple[int, ...]:
        """The tokens of the captions."""
        return self.text_lengths


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeClips(Movable):
    """A microbatch for Megatron's own schedule."""

    text: TextBatch
    dit: DitBatch

    @property
    def loss_mask(self) -> Tensor:
        """``[N]`` float32."""
        return self.dit.loss_mask


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipMicrobatch(Microbatch):
    """The clips of one microbatch."""

    clips: tuple[Clip, ...]

    def metadata(self) -> ItemSizes:
        """Tokens of every caption, patches of every clip and the caption that it reads."""
        items = [
            clip_items(len(clip.tokens), clip.num_patches, number)
            for number, clip in enumerate(self.clips)
        ]
        return {module: [item[module] for item in items] for module in ("text", "dit")}

    def sub_batch(self, module: str, items: Sequence[int]) -> TextBatch | DitBatch:
        """See :class:`Microbatch`."""
        check_items(module, items, {"text": len(self.clips), "dit": len(self.clips)})
        return self._text(items) if module == "text" else self._dit(items)

    @cached_property
    def without_media(self) -> Self:
        """See :class:`Microbatch`."""
        return replace(
            self, clips=tuple(replace(clip, latents=None, noise=None) for clip in self.clips)
        )

    def whole(self, seq_length: int) -> WholeClips:
        """See :class:`Microbatch`; the stock model pads at its boundaries itself."""
        every = range(len(self.clips))
        return WholeClips(text=self._text(every), dit=self._dit(every))

    def _text(self, items: Sequence[int]) -> TextBatch:
        texts = [self.clips[item].tokens for item in items]
        lengths = tuple(len(text) for text in texts)
        nothing = torch.empty(0, dtype=torch.int64)
        return TextBatch(
            tokens=torch.cat([nothing, *texts]),
            position_ids=torch.cat([nothing, *(torch.arange(length) for length in lengths)]),
            span_lengths=lengths,
            items=tuple(items),
        )

    def _dit(self, items: Sequence[int]) -> DitBatch:
        clips = [self.clips[item] for item in items]
        inputs, targets = [], []
        for clip in clips:
            if clip.latents is not None and clip.noise is not None:
                inputs.append((1 - clip.time) * clip.latents + clip.time * clip.noise)
                targets.append(clip.noise - clip.latents)
        assert len(inputs) in (0, len(clips)), "a rank has the latents of all of its clips or none"
        return DitBatch(
            inputs=torch.cat(inputs) if inputs else None,
            targets=torch.cat(targets) if targets else None,
            times=torch.tensor([clip.time for clip in clips], dtype=torch.float32),
            loss_mask=torch.ones(sum(clip.num_patches for clip in clips)),
            grids=tuple(clip.grid for clip in clips),
            text_lengths=tuple(len(clip.tokens) for clip in clips),
            items=tuple(items),
        )
