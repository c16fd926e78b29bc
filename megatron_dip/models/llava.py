"""Stages of Megatron's ``LLaVAModel``: a vision tower with a projection before a language model.

Both are cut independently.  A stage is a model of the same class with only the tower or only the
language model in it.  The towers are made whole by their class, so that a stage of the tower is
changed after construction: what sits before its first layer gives zeros that nobody reads, and
what follows its last layer is switched off.

An item of the tower is a tile of an image, an item of the language model a sequence.  Batches are
the dicts of ``pretrain_vlm.py`` (``image`` [tiles, 3, height, width], one per sequence) and of
``examples/multimodal`` (``imgs``, and ``num_tiles`` [images]); ``tokens`` [sequences, tokens] has
one token per image.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX
from megatron.core.models.vision.clip_vit_model import CLIPViTModel, get_num_image_embeddings
from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.models.batches import join, take_rows
from megatron_dip.models.boundaries import batched
from megatron_dip.models.encoders import drop_clip_stem
from megatron_dip.models.entry import PassThrough, enter, placeholder, replace
from megatron_dip.models.hybrid import clone_if_empty, hybrid_layers
from megatron_dip.models.layout import cut_config, cut_spec
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel

__all__ = ["StagedLlava"]

VISION = "vision"
LANGUAGE = "language"
_HYBRID = ("nemotron5-hybrid", "nemotron6-moe")
_PER_SEQUENCE = ("tokens", "labels", "loss_mask", "position_ids")


@register("megatron.core.models.multimodal.llava_model.LLaVAModel")
class StagedLlava(StagedModel):
    """A vision tower and a language model."""

    def __init__(self, arguments: Mapping[str, Any], run: RunFacts) -> None:
        super().__init__(arguments, run)
        self.language = arguments["language_transformer_config"]
        self.vision = arguments["vision_transformer_config"]
        self.num_rows = arguments["language_max_sequence_length"]
        """Of every sequence: the model pads to it where it believes that there is a pipeline."""

    def modules(self) -> tuple[ModuleShape, ...]:
        """Tower and language model."""
        self._check()
        width = self.language.hidden_size
        return (
            module_shape(VISION, self.vision, output_width=width),
            module_shape(
                LANGUAGE,
                self.language,
                upstream=(VISION,),
                causal=True,
                vocab_size=self.arguments["language_vocab_size"],
            ),
        )

    def _check(self) -> None:
        given = self.arguments
        tower = self.vision.vision_model_type
        kind = self.language_type
        refused = (
            (tower.startswith("hf://"), f"tower {tower} (its layers are not Megatron's)"),
            (kind.startswith("hf://"), f"language model {kind} (its layers are not Megatron's)"),
            (given.get("tile_tags"), "tile tags (the tower would need the text's embedding)"),
            (given.get("dynamic_resolution"), "dynamic resolution (all images are one item)"),
            (given.get("sound_model"), "a sound model (it is handed over ready-made)"),
        )
        for is_there, what in refused:
            if is_there:
                raise UnsupportedError(
                    f"--dip-schedule cannot cut a LLaVAModel with {what}: choose another, or train "
                    "without --dip-schedule"
                )

    @property
    def language_type(self) -> str:
        """By which the model's class tells what to make of the language model's configuration."""
        return getattr(self.language, "language_model_type", "")

    @property
    def class_rows(self) -> int:
        """Rows that the tower has beside those of patches."""
        tower = self.vision.vision_model_type
        if tower == "siglip":
            return 0
        if tower not in ("radio", "radio-g", "cradio-g"):
            return 1
        if self.vision.fp8 or self.arguments.get("use_vision_backbone_fp8_arch"):
            return 32 if self.vision.fp8_recipe == "mxfp8" else 16
        return int(getattr(self.vision, "class_token_len", 5 if tower == "radio-g" else 8))

    @property
    def tower_rows(self) -> int:
        """Rows of a tile between the tower's layers."""
        given = self.arguments
        height, width = (given[name] // given["patch_dim"] for name in ("img_h", "img_w"))
        return int(height * width + self.class_rows)

    @property
    def rows_per_tile(self) -> int:
        """Rows of a tile that the language model reads."""
        given = self.arguments
        return int(
            get_num_image_embeddings(
                given["img_h"],
                given["img_w"],
                given["patch_dim"],
                self.vision.vision_model_type,
                given["drop_vision_class_token"],
                self.class_rows,
                given["pixel_shuffle"],
            )
        )

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """One of the two modules, cut."""
        is_vision = part.module == VISION
        nothing = part._replace(first_layer=0, num_layers=0, first=False, last=False)
        language = cut_config(self.language, nothing if is_vision else part)
        spec = self.arguments["language_transformer_layer_spec"]
        tied = self.arguments["share_embeddings_and_output_weights"]
        return {
            "language_transformer_config": language,
            "language_transformer_layer_spec": spec
            if is_vision
            else cut_spec(spec, part, self.language.num_layers),
            "vision_transformer_config": cut_config(self.vision, part if is_vision else nothing),
            "vision_transformer_layer_spec": self._vision_spec(part),
            "share_embeddings_and_output_weights": tied and not is_vision,
            "add_encoder": is_vision,
            "add_decoder": not is_vision,
            "pre_process": part.first and not is_vision,
            "post_process": part.last and not is_vision,
            "vp_stage": None,
        }

    def _vision_spec(self, part: Part) -> Any:
        spec = self.arguments["vision_transformer_layer_spec"]
        return cut_spec(spec, part, self.vision.num_layers) if part.module == VISION else spec

    def constructing(self, part: Part) -> AbstractContextManager[None]:
        """Layers of a hybrid language model are taken out of its pattern."""
        if part.module == LANGUAGE and self.language_type.startswith(_HYBRID):
            return hybrid_layers(part, self.language.num_layers)
        return nullcontext()

    def finish(self, model: torch.nn.Module, part: Part) -> None:
        """Drop what the tower has before and behind the stage's layers."""
        given: Any = model
        given.img_seq_len = self.rows_per_tile
        if part.module == LANGUAGE:
            if part.first:
                given.register_forward_pre_hook(_read_nothing)
            if self.language_type.startswith(_HYBRID):
                clone_if_empty(given.language_model.decoder, part)
            return
        if not part.first:
            _enter_tower(given)
        if not part.last:
            given._drop_vision_class_token = given._pixel_shuffle = False
            given.vision_projection = PassThrough()
            replace(given.vision_model, "ln_post", None)

    def items(self, batch: Mapping[str, Any]) -> ItemSizes:
        """A tile is an item, and a sequence is one."""
        tiles, losses = self._tiles(batch), self._loss_tokens(batch).tolist()
        rows = self.tower_rows
        tile = ItemSize(tokens=rows, spans=(rows,), output_tokens=self.rows_per_tile)
        spans = self._spans(batch)
        return {
            VISION: (tile,) * sum(map(len, tiles)),
            LANGUAGE: tuple(
                ItemSize(
                    tokens=self.num_rows,
                    spans=spans,
                    needs={VISION: tuple(own)},
                    loss_tokens=loss,
                )
                for own, loss in zip(tiles, losses, strict=True)
            ),
        }

    def _spans(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        starts = batch.get("cu_lengths")
        if starts is None or starts.numel() == 1:
            return (self.num_rows,)
        lengths = torch.diff(starts[0]).tolist()
        return tuple(length for length in lengths if length > 0)

    def _is_image(self, batch: Mapping[str, Any]) -> Tensor:
        found: Tensor = batch["tokens"] == self.arguments["image_token_index"]
        return found

    def _image_tiles(self, batch: Mapping[str, Any]) -> Tensor:
        """[images]: tiles of each image of the batch."""
        num_images = int(self._is_image(batch).sum())
        if batch.get("num_tiles") is None:
            return torch.ones(num_images, dtype=torch.int64)
        tiles: Tensor = batch["num_tiles"].flatten()[:num_images].long()
        return tiles

    def _tiles(self, batch: Mapping[str, Any]) -> list[range]:
        """The tiles of every sequence."""
        ends = [0, *self._image_tiles(batch).cumsum(0).tolist()]
        images = [0, *self._is_image(batch).sum(dim=1).cumsum(0).tolist()]
        borders = [ends[image] for image in images]
        return [range(*pair) for pair in pairwise(borders)]

    def _loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """[sequences]: as the model counts them: none of an image, and none that predicts one."""
        is_image = self._is_image(batch)
        lengths = torch.ones_like(batch["tokens"])
        lengths[is_image] = (self._image_tiles(batch) * self.rows_per_tile).to(lengths.dtype)
        counts = (lengths.cumsum(dim=1) <= self.num_rows) & ~is_image
        counts[:, :-1] &= ~is_image[:, 1:]
        if "loss_mask" in batch:
            return (batch["loss_mask"] * counts).sum(dim=1).int()
        from megatron.training import get_tokenizer

        labels = batch["labels"][:, 1 : batch["tokens"].shape[1] + 1]
        counts &= (labels != get_tokenizer().pad) & (labels != IGNORE_INDEX)
        return counts.sum(dim=1)

    def part_of(self, batch: Mapping[str, Any], part: Part, items: Sequence[int]) -> dict[str, Any]:
        """Pixels go to the first stage of the tower; all others get how many tiles there are."""
        name = _pixels_of(batch)
        if part.module == VISION:
            chosen = take_rows(batch[name], items)
            return {**batch, name: chosen if part.first else chosen[:, :1, :1, :1]}
        taken = self._sequences(batch, items)
        has_tiles = taken[name].dim() > 2
        return {**taken, name: taken[name][:, :1, :1, :1] if has_tiles else taken[name]}

    def _sequences(self, batch: Mapping[str, Any], items: Sequence[int]) -> dict[str, Any]:
        """The batch with these sequences alone, and their tiles."""
        name = _pixels_of(batch)
        pixels = batch[name]
        taken = {key: take_rows(batch[key], items) for key in _PER_SEQUENCE if key in batch}
        tiles = self._tiles(batch)
        own = [tile for item in items for tile in tiles[item]]
        if batch.get("num_tiles") is not None:
            numbers = torch.arange(len(batch["tokens"])).repeat_interleave(
                self._is_image(batch).sum(dim=1)
            )
            images = [at for item in items for at in (numbers == item).nonzero().flatten().tolist()]
            # The script knows a batch of text alone by these two.
            taken["num_tiles"] = (
                take_rows(batch["num_tiles"], images)
                if images
                else batch["num_tiles"].new_zeros(1, 1)
            )
            if not own:
                return {**batch, **taken, name: pixels.new_zeros(1, 1)}
        return {**batch, **taken, name: take_rows(pixels, own)}

    def single_samples(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Sequences with their tiles.

        Raises:
            UnsupportedError: Samples are packed into sequences, whose lengths the batch has once.
        """
        if len(self._spans(batch)) > 1:
            raise UnsupportedError(
                "a batch of packed sequences says where samples start for all of them together: "
                "they cannot be told apart (leave schedule.assignment out)"
            )
        return [self._sequences(batch, (number,)) for number in range(len(batch["tokens"]))]

    def join_samples(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sequence by sequence, and their tiles in that order."""
        name = _pixels_of(samples[0])
        joined = {
            key: torch.cat([sample[key] for sample in samples])
            for key in _PER_SEQUENCE
            if key in samples[0]
        }
        seen = [sample for sample in samples if sample[name].dim() > 2]
        for key in (name, "num_tiles"):
            if samples[0].get(key) is not None:
                joined[key] = torch.cat([one[key] for one in seen]) if seen else samples[0][key]
        return {**samples[0], **joined}

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Tiles side by side and sequences side by side."""
        if module == VISION and outer:
            return Boundary("batched", self.language.hidden_size)
        return batched(self.vision if module == VISION else self.language)

    def inputs(self, part: Part, received: Sequence[Received]) -> list[Tensor | None]:
        """The language model's first stage takes the tiles of its sequences in their order."""
        if part.module == LANGUAGE and part.first:
            return [join(received, dim=1) if received else None]
        return super().inputs(part, received)

    def check_split(self, module: str) -> None:
        """
        Raises:
            UnsupportedError: The script's loss weighs turns among each other.
        """
        from megatron.training import get_args

        if module == LANGUAGE and getattr(get_args(), "use_loss_scaling", False):
            raise UnsupportedError(
                "--use-loss-scaling divides by a sum over all sequences of a microbatch (leave it "
                f"out, or do not split microbatches of {LANGUAGE})"
            )


def _pixels_of(batch: Mapping[str, Any]) -> str:
    return "image" if "image" in batch else "imgs"


def _read_nothing(model: Any, _: Any) -> None:
    """Sequences without images: as many rows as the model would make of none."""
    if model.encoder_hidden_state is None:
        weight = model.language_model.embedding.word_embeddings.weight
        dtype = torch.float32 if model.config.fp32_residual_connection else weight.dtype
        model.encoder_hidden_state = weight.new_zeros((0, 0, weight.shape[1]), dtype=dtype)


def _enter_tower(model: Any) -> None:
    """Let the tower start at what has arrived, whatever pixels the script has."""
    tower = model.vision_model
    if isinstance(tower, CLIPViTModel):
        drop_clip_stem(tower)
    else:
        _drop_radio_stem(tower)
    shape = (3, tower.img_h, tower.img_w)
    placeholder(
        model,
        "images",
        lambda: tower.decoder.input_tensor.new_zeros(()).expand(
            tower.decoder.input_tensor.shape[1], *shape
        ),
    )


def _drop_radio_stem(tower: Any) -> None:
    enter(tower.decoder)
    replace(tower, "embedder", _PatchCount())
    del tower.position_embeddings
    tower.apply_pos_enc = lambda patches, **_: (patches, None)
    if tower.use_mask_token:
        del tower.mask_token
    replace(tower, "ln_pre", None)
    if tower.add_class_token:
        del tower.class_token
        nothing = torch.zeros(tower.class_token_len, 1)
        tower.register_buffer("class_token", nothing, persistent=False)


class _PatchCount(torch.nn.Module):
    """In place of the linear layer over pixels: a zero for every patch."""

    def forward(self, patches: Tensor) -> tuple[Tensor, None]:
        return patches.new_zeros((*patches.shape[:-1], 1)), None
