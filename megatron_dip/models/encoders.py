"""How the encoder of a modality is cut: Megatron's CLIP tower, or any other, kept whole.

``MimoModel`` takes encoders of any class.  One whose class is described here, or by
``register_encoder``, is cut between its layers.  Any other is one layer: it runs in one stage, and
the projection after it may be in another.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize, ModuleShape
from megatron_dip.costs.shapes import GenericLayers
from megatron_dip.errors import PartitionError, UnsupportedError
from megatron_dip.models.batches import num_samples
from megatron_dip.models.boundaries import batched
from megatron_dip.models.entry import enter, leave, replace
from megatron_dip.models.layout import cut_config, cut_spec
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.models.staged import Part

__all__ = ["StagedEncoder", "drop_clip_stem", "encoder_of", "register_encoder"]


class StagedEncoder(ABC):
    """How one class of encoder runs in stages.  An item is what stands under one index of the first
    dimension of all its inputs.

    Args:
        name: Of the modality.
        spec: Of the encoder, as the script gave it.
        width: Of the rows that come out of it.
        output_width: Of the rows that the language model gets.
    """

    def __init__(self, name: str, spec: ModuleSpec, width: int, output_width: int) -> None:
        self.name = name
        self.spec = spec
        self.width = width
        self.output_width = output_width

    @abstractmethod
    def shape(self) -> ModuleShape:
        """Of the module."""

    @abstractmethod
    def boundary(self) -> Boundary:
        """Between its stages."""

    @abstractmethod
    def cut_spec(self, part: Part) -> ModuleSpec:
        """What builds the encoder of a stage.  A later one takes what has arrived by
        ``set_input_tensor``, and is called with the inputs all the same.

        Raises:
            PartitionError: It cannot be cut there.
        """

    def finish(self, encoder: Any, part: Part, modality: Any) -> None:  # noqa: B027
        """Change the encoder of a stage that was built.

        Args:
            encoder: It.
            part: The stage.
            modality: The submodule that calls it; a stage that is not the last one hands on what
                its forward returns.
        """

    @abstractmethod
    def sizes(self, inputs: Mapping[str, Any], num_places: int) -> tuple[ItemSize, ...]:
        """Of all items in its inputs.

        Args:
            inputs: Of its forward, by name.
            num_places: Tokens in the sequences that its rows replace.
        """


class _StagedClip(StagedEncoder):
    """``CLIPViTModel``: an item is an image."""

    @property
    def _config(self) -> Any:
        return self.spec.params["transformer_config"]

    def shape(self) -> ModuleShape:
        return module_shape(self.name, self._config, output_width=self.output_width)

    def boundary(self) -> Boundary:
        return batched(self._config)

    def cut_spec(self, part: Part) -> ModuleSpec:
        layers = self.spec.params["transformer_layer_spec"]
        changed = {
            "transformer_config": cut_config(self._config, part),
            "transformer_layer_spec": cut_spec(layers, part, self._config.num_layers),
        }
        return ModuleSpec(self.spec.module, self.spec.params | changed)

    def finish(self, encoder: Any, part: Part, modality: Any) -> None:
        if not part.first:
            drop_clip_stem(encoder)
        if not part.last:
            replace(encoder, "ln_post", None)
            leave(modality, after=encoder.decoder)

    def sizes(self, inputs: Mapping[str, Any], num_places: int) -> tuple[ItemSize, ...]:
        given = self.spec.params
        side = given.get("patch_dim", 14)
        tokens = (given.get("img_h", 336) // side) * (given.get("img_w", 336) // side)
        if given.get("add_class_token", True):
            tokens += given.get("class_token_len", 1)
        return (ItemSize(tokens=tokens, spans=(tokens,)),) * num_samples(inputs)


def drop_clip_stem(tower: Any) -> None:
    """Let the tower start at what has arrived; what comes before its layers has no weights."""
    grid = (tower.num_patches_per_dim_h, tower.num_patches_per_dim_w)
    enter(
        tower.decoder,
        {
            (tower, "conv1"): lambda pixels: (len(pixels), 1, *grid),
            (tower, "position_embeddings"): lambda positions: (*positions.shape, 1),
        },
    )
    replace(tower, "ln_pre", None)
    if tower.add_class_token:
        nothing = torch.zeros(1, tower.class_token_len, 1)
        del tower.class_token
        tower.register_buffer("class_token", nothing, persistent=False)


class _WholeEncoder(StagedEncoder):
    """An encoder of which nothing is known: one layer.

    All items have as many rows: as many as there are places for them, divided by the items.
    """

    def shape(self) -> ModuleShape:
        return ModuleShape(
            name=self.name,
            kind="generic",
            num_layers=1,
            hidden_size=self.width,
            ffn_hidden_size=4 * self.width,
            num_attention_heads=1,
            generic=GenericLayers(
                attention_size=self.width,
                key_value_size=2 * self.width,
                output_size=self.output_width,
            ),
        )

    def boundary(self) -> Boundary:
        return Boundary("flat", self.width)

    def cut_spec(self, part: Part) -> ModuleSpec:
        if part.first and not part.num_layers:
            raise PartitionError(
                f"module {self.name}: its only layer is a whole {self.spec.module.__name__}, and "
                f"nothing comes before it (expected this layer on the first rank: 1, then zeros)"
            )
        return self.spec if part.first else ModuleSpec(_Arrived, params={})

    def finish(self, encoder: Any, part: Part, modality: Any) -> None:
        if part.first:
            encoder.layer_number = 1

    def sizes(self, inputs: Mapping[str, Any], num_places: int) -> tuple[ItemSize, ...]:
        num_items = num_samples(inputs)
        rows, rest = divmod(num_places, max(num_items, 1))
        if rest or not num_items:
            raise UnsupportedError(
                f"module {self.name}: {num_items} items for {num_places} places in the sequences "
                f"(expected as many for each: say by register_encoder how many rows "
                f"{self.spec.module.__name__} makes of an item)"
            )
        return (ItemSize(tokens=rows, spans=(rows,)),) * num_items


class _Arrived(torch.nn.Module):
    """In place of an encoder in the stage after it: gives what has arrived."""

    def set_input_tensor(self, tensor: Tensor) -> None:
        self._arrived = [tensor]

    def forward(self, **_: Any) -> Tensor:
        return self._arrived.pop()


_ENCODERS: dict[type, type[StagedEncoder]] = {CLIPViTModel: _StagedClip}


def register_encoder(encoder: type) -> Callable[[type[StagedEncoder]], type[StagedEncoder]]:
    """A decorator of the :class:`StagedEncoder` that says how the class ``encoder`` is cut."""

    def add(staged: type[StagedEncoder]) -> type[StagedEncoder]:
        _ENCODERS[encoder] = staged
        return staged

    return add


def encoder_of(name: str, spec: ModuleSpec, width: int, output_width: int) -> StagedEncoder:
    """How the encoder of modality ``name`` is cut; arguments as of :class:`StagedEncoder`."""
    staged = _ENCODERS.get(spec.module, _WholeEncoder)
    return staged(name, spec, width, output_width)
