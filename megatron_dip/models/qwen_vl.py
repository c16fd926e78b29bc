"""Stages of megatron-bridge's ``Qwen25VLModel``: a Hugging Face tower before a language model.

The tower is made whole by its class, so that its stages are changed after construction: layers of
other stages are dropped, and the last one before the stage's own gives what has arrived.

Batches are those of megatron-bridge's ``vlm_step``, and every rank reads them; pixels are needed in
the tower's first stage alone.  An item of the tower is an image or a video, first all images of a
microbatch and then all videos, and an item of the language model a sequence.
"""

import copy
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
from megatron_dip.costs.shapes import GenericLayers
from megatron_dip.errors import UnsupportedError
from megatron_dip.models.batches import items_in_places, join, take_rows, take_samples
from megatron_dip.models.boundaries import batched
from megatron_dip.models.entry import PassThrough, keep_layers, leave
from megatron_dip.models.layout import cut_config
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel

__all__ = ["StagedQwenVL"]

VISION = "vision"
LANGUAGE = "language"

_MODELING = "megatron.bridge.models.qwen_vl.modeling_qwen25_vl"
_TOWER = "Qwen2_5_VisionTransformerPretrainedModel"
_PER_SEQUENCE = ("tokens", "input_ids", "position_ids", "attention_mask", "loss_mask", "labels")


class _Medium(NamedTuple):
    """What belongs to images, or to videos: fields of a batch, and a field of the configuration."""

    pixels: str
    """[patches, values]."""
    grids: str
    """[items, 3]: frames, rows and columns of patches."""
    token: str


_MEDIA = (
    _Medium("pixel_values", "image_grid_thw", "image_token_id"),
    _Medium("pixel_values_videos", "video_grid_thw", "video_token_id"),
)
_FRAME_SECONDS = "second_per_grid_ts"
"""[videos]."""


@register(f"{_MODELING}.Qwen25VLModel")
class StagedQwenVL(StagedModel):
    """A vision tower and a language model."""

    def __init__(self, arguments: Mapping[str, Any], run: RunFacts) -> None:
        super().__init__(arguments, run)
        self._config = arguments["config"]
        self._tower = self._config.vision_config
        self._item_rows: list[int] = []
        """Of the images and videos that the language model is about to read."""

    def modules(self) -> tuple[ModuleShape, ...]:
        """Tower and language model.

        Raises:
            UnsupportedError: One of several stages on a rank would share its embedding.
        """
        tied = self._config.share_embeddings_and_output_weights
        if tied and self.run.num_pipeline_ranks == 1:
            raise UnsupportedError(
                "Qwen25VLModel with tied embeddings on one pipeline rank: nothing would add their "
                "gradients up (expected more ranks, or share_embeddings_and_output_weights=False)"
            )
        width = self._tower.hidden_size
        tower = ModuleShape(
            name=VISION,
            kind="generic",
            num_layers=self._tower.depth,
            hidden_size=width,
            ffn_hidden_size=self._tower.intermediate_size,
            num_attention_heads=self._tower.num_heads,
            generic=GenericLayers(
                attention_size=width,
                key_value_size=2 * width,
                is_gated=True,
                output_size=self._config.hidden_size,
            ),
        )
        language = module_shape(
            LANGUAGE,
            self._config,
            upstream=(VISION,),
            causal=True,
            vocab_size=self._config.vocab_size,
        )
        return (tower, language)

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """One of the two modules; the tower is cut in ``finish``."""
        if part.module == LANGUAGE:
            config = cut_config(self._config, part)
            return {"config": config, "pre_process": part.first, "post_process": part.last}
        config = copy.copy(self._config)
        config.provide_language_model = lambda **_: _NoLanguage()
        return {"config": config, "pre_process": True, "post_process": False}

    @contextmanager
    def constructing(self, part: Part) -> Iterator[None]:
        """The model makes a tower wherever it embeds tokens; a language stage has none."""
        if part.module == VISION:
            yield
            return
        modeling = importlib.import_module(_MODELING)
        tower = getattr(modeling, _TOWER)
        setattr(modeling, _TOWER, SimpleNamespace(_from_config=_Features))
        try:
            yield
        finally:
            setattr(modeling, _TOWER, tower)

    def finish(self, model: Any, part: Part) -> None:
        """Drop layers of other stages, and let the model take what has arrived."""
        model.pg_collection = self._config._pg_collection
        if part.module == VISION:
            model.pre_process, model.post_process = part.first, False
            model.share_embeddings_and_output_weights = False
            _cut_tower(model, part)
        elif part.first:
            model.set_input_tensor = model.visual.set_input_tensor
            model.visual.item_rows = self._item_rows

    def items(self, batch: Mapping[str, Any]) -> ItemSizes:
        """Images and videos, and sequences.

        Raises:
            DataError: Rows of images or videos do not fill their places in the sequences.
        """
        tokens, visual = _tokens(batch), _visual(batch)
        sizes: list[ItemSize] = []
        needs: list[tuple[int, ...]] = [()] * len(tokens)
        for medium in _MEDIA:
            is_place = tokens == getattr(self._config, medium.token)
            grids = visual.get(medium.grids)
            new = [] if grids is None else [self._size(*grid) for grid in grids.tolist()]
            rows = [size.num_output_rows for size in new]
            found = items_in_places(VISION, rows, is_place.sum(dim=1).tolist())
            for number, items in enumerate(found):
                needs[number] += tuple(item + len(sizes) for item in items)
            sizes += new
        starts = batch.get("cu_seqlens_q")
        spans = (tokens.shape[1],) if starts is None else tuple(starts.flatten().diff().tolist())
        losses = batch["loss_mask"].sum(dim=1).int().tolist()
        language = tuple(
            ItemSize(
                tokens=tokens.shape[1],
                spans=spans,
                needs={VISION: needs[number]},
                loss_tokens=loss,
            )
            for number, loss in enumerate(losses)
        )
        return {VISION: tuple(sizes), LANGUAGE: language}

    def _size(self, num_frames: int, num_rows: int, num_columns: int) -> ItemSize:
        patches = num_rows * num_columns
        return ItemSize(
            tokens=num_frames * patches,
            spans=(patches,) * num_frames,
            output_tokens=num_frames * patches // self._tower.spatial_merge_size**2,
        )

    def part_of(self, batch: Mapping[str, Any], part: Part, items: Sequence[int]) -> dict[str, Any]:
        """Grids go to all stages: the language model's positions follow from them."""
        visual = _visual(batch)
        if part.module == VISION:
            taken = _take_items(visual, items, with_pixels=part.first)
            return {**batch, "visual_inputs": _with(batch["visual_inputs"], taken)}
        sequences = take_samples(batch, _PER_SEQUENCE, items, len(_tokens(batch)))
        if not visual:
            return {**batch, **sequences}
        sizes = self.items(batch)[LANGUAGE]
        wanted = [item for number in items for item in sizes[number].needs[VISION]]
        taken = _take_grids(visual, sorted(wanted))
        if part.first:
            # Only where there are pixels the model asks for features.
            taken |= {one.pixels: torch.empty(0) for one in _MEDIA if one.grids in taken}
        return {**batch, **sequences, "visual_inputs": _with(batch["visual_inputs"], taken)}

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Rows of images and videos one after another, sequences side by side."""
        if module == LANGUAGE:
            return batched(self._config)
        return Boundary("flat", self._config.hidden_size if outer else self._tower.hidden_size)

    def inputs(self, part: Part, received: Sequence[Received]) -> list[Tensor | None]:
        """The language model's first stage takes the rows of its sequences in their order."""
        if part.module == LANGUAGE and part.first:
            sizes = {
                item: size.num_output_rows
                for one in received
                for item, size in zip(one.items, one.sizes, strict=True)
            }
            self._item_rows[:] = [sizes[item] for item in sorted(sizes)]
            return [join(received, dim=0) if received else None]
        return super().inputs(part, received)


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """[sequences, tokens]."""
    found = batch.get("tokens")
    tokens: Tensor = batch["input_ids"] if found is None else found
    return tokens


def _visual(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of images and videos, as the model takes them."""
    visual = batch.get("visual_inputs")
    return {} if visual is None else dict(visual.normalized_for_model())


def _with(visual_inputs: Any, fields: Mapping[str, Tensor]) -> Any:
    """Visual inputs of the same class with nothing but ``fields``."""
    new = copy.copy(visual_inputs)
    for name in vars(new):
        setattr(new, name, fields.get(name))
    return new


def _take_grids(visual: Mapping[str, Tensor], items: Sequence[int]) -> dict[str, Tensor]:
    """What says how large some images and videos are."""
    taken: dict[str, Tensor] = {}
    start = 0
    for medium in _MEDIA:
        grids = visual.get(medium.grids)
        if grids is not None:
            rows = [item - start for item in items if start <= item < start + len(grids)]
            start += len(grids)
            if rows:
                taken[medium.grids] = take_rows(grids, rows)
    if _MEDIA[1].grids in taken and _FRAME_SECONDS in visual:
        # Of videos, which are the last ones.
        taken[_FRAME_SECONDS] = take_rows(visual[_FRAME_SECONDS], rows)
    return taken


def _take_items(
    visual: Mapping[str, Tensor], items: Sequence[int], *, with_pixels: bool
) -> dict[str, Tensor]:
    """Some images and videos in the order of ``items``: all as images, as the tower takes them."""
    held = [one for one in _MEDIA if one.grids in visual]
    grids = torch.cat([visual[one.grids] for one in held])
    taken = {_MEDIA[0].grids: take_rows(grids, items)}
    if with_pixels:
        pixels = torch.cat([visual[one.pixels] for one in held])
        of_item = pixels.split(grids.prod(dim=1).tolist())
        taken[_MEDIA[0].pixels] = torch.cat([of_item[item] for item in items])
    return taken


class _NoLanguage(torch.nn.Module):
    """In place of the language model in stages of the tower."""

    def shared_embedding_or_output_weight(self) -> None:
        return None

    def set_input_tensor(self, tensors: Sequence[None]) -> None:
        """Nothing has arrived in the first stage."""


class _Features(torch.nn.Module):
    """In place of the tower in the language model's first stage: gives the rows that have arrived.

    Args:
        config: Of the tower.
    """

    dtype = torch.float32
    """Of pixels, which nobody reads here."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.spatial_merge_size: int = config.spatial_merge_size
        self.item_rows: Sequence[int] = ()
        """Of each image and video; grids say the same, but on the device."""
        self._rows: Tensor | None = None
        self._num_given = 0

    def set_input_tensor(self, tensors: Sequence[Tensor | None]) -> None:
        (self._rows,) = tensors
        self._num_given = 0

    def forward(self, pixels: Tensor, grid_thw: Tensor, **_: Any) -> SimpleNamespace:
        """Rows of the images or videos in ``grid_thw``; the next call gives those behind them."""
        assert self._rows is not None
        start, self._num_given = self._num_given, self._num_given + len(grid_thw)
        num_rows = sum(self.item_rows[start : self._num_given])
        taken, rest = self._rows[:num_rows], self._rows[num_rows:]
        self._rows = rest if len(rest) else None
        return SimpleNamespace(pooler_output=taken)


class _Arrived(torch.nn.Module):
    """In place of the last layer before the stage's own: gives what has arrived."""

    @property
    def num_rows(self) -> int:
        return len(self._hidden[0])

    def set_input_tensor(self, tensors: Sequence[Tensor]) -> None:
        self._hidden = list(tensors)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self._hidden.pop()


def _cut_tower(model: Any, part: Part) -> None:
    """Leave the layers of ``part`` in the tower.

    The layer before the first one is the patch embedding: what is handed on before it is what it
    gives, so that a stage without layers hands on the same.
    """
    tower = model.visual
    arrived = None if part.first else _Arrived()
    model.forward = functools.partial(_run_tower, model, arrived)
    keep_layers(tower.blocks, part.layers)
    if not part.last:
        tower.merger = PassThrough()
        last = part.layers.stop - 1
        leave(model, after=tower.blocks[last] if part.layers.stop else tower.patch_embed)
    if arrived is not None:
        model.set_input_tensor = arrived.set_input_tensor
        tower.patch_embed = PassThrough()
        if part.first_layer:
            tower.blocks[part.first_layer - 1] = arrived
        else:
            tower.patch_embed = arrived


def _run_tower(
    model: Any,
    arrived: _Arrived | None,
    image_grid_thw: Tensor,
    pixel_values: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The forward of a stage of the tower, from the arguments of the model's own.

    Returns:
        [patches, width], or [rows, width] of the language model from the last stage.
    """
    if arrived is not None:
        # A row for every patch is all that later stages read of it.
        pixel_values = image_grid_thw.new_zeros(arrived.num_rows, 1)
    assert pixel_values is not None
    patches = pixel_values.type(model.visual.dtype)
    rows: Tensor = model.visual(patches, grid_thw=image_grid_thw).pooler_output
    return rows
