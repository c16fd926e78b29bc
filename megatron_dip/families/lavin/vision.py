"""Stages of LaVIN's vision tower: CLIP's vision transformer with routed adapters, cut anywhere.

Every image is one span of P rows: the class row and P - 1 patches.  The module's output are the
class rows after some of its layers, as they are in the residual stream: F feature rows per image,
one image after another.  Those made so far travel with the rows from stage to stage.  Notation: n
images, N = n P rows, H hidden; on a tensor-parallel rank N / t with sequence parallelism::

    boundary  inner   [N (or N / t, padded) + n F, 1, H]    output  [n F, 1, H]

Feature rows are whole on every tensor-parallel rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from megatron.core.activations import quick_gelu
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.forms import TransformerSizes
from megatron_dip.families.lavin.adapter import AdapterOptions, Routing, initial_distribution
from megatron_dip.families.lavin.layers import adapted_block_submodules, routed_span_params
from megatron_dip.families.packed.configs import make_vision_config
from megatron_dip.families.packed.media import media_of_first_rank
from megatron_dip.families.packed.stage import StageLayers, StageModule, pad_rows

if TYPE_CHECKING:
    from megatron_dip.families.lavin.batches import ClipBatch

__all__ = ["ClipStage", "GateMode", "clip_routing", "make_clip_config"]

GateMode = Literal["token", "cls", "public_code"]
"""Whose gate weighs a row: its own (``token``), that of its image's class row (``cls``), or that of
the row at its place in the first image of the batch (``public_code``, what the released code does:
there a result depends on what else is in the batch).  The first equals the last for batches of one
image."""


def make_clip_config(
    base: TransformerConfig,
    *,
    norm_epsilon: float | None = None,
    **sizes: Unpack[TransformerSizes],
) -> TransformerConfig:
    """CLIP's: LayerNorm, biases, x sigmoid(1.702 x)."""
    config = make_vision_config(base, norm_epsilon=norm_epsilon, **sizes)
    config.activation_func = quick_gelu
    # Fused kernels know other activations alone.
    config.bias_activation_fusion = False
    return config


def clip_routing(
    mode: GateMode, num_images: int, rows_per_image: int, num_rows: int, device: torch.device
) -> Routing:
    """The routing of a batch of images; ``num_rows`` counts padding as well."""
    if mode == "token":
        return Routing()
    rows = torch.arange(num_images * rows_per_image, device=device)
    if mode == "cls":
        source_rows = rows[::rows_per_image]
        gate_of_row = rows // rows_per_image
    else:
        source_rows = rows[:rows_per_image]
        gate_of_row = rows % rows_per_image
    return Routing(source_rows=source_rows, gate_of_row=pad_rows(gate_of_row, num_rows))


class ClipModel(MegatronModule):
    """Embedding with its norm (first stage), and layers."""

    def __init__(
        self,
        stage: StageModule,
        *,
        patch_size: int,
        rows_per_image: int,
        adapter: AdapterOptions,
    ) -> None:
        config = stage.config
        super().__init__(config=config)
        hidden, dtype = config.hidden_size, config.params_dtype
        if stage.pre_process:
            self.patch_embedding = torch.nn.Linear(
                3 * patch_size**2, hidden, bias=False, dtype=dtype
            )
            self.class_embedding = torch.nn.Parameter(torch.zeros(hidden, dtype=dtype))
            self.position_embedding = torch.nn.Parameter(
                torch.zeros(rows_per_image, hidden, dtype=dtype)
            )
            self.input_norm = torch.nn.LayerNorm(hidden, eps=config.layernorm_epsilon, dtype=dtype)
        self.decoder = TransformerBlock(
            config=config,
            spec=adapted_block_submodules(
                config,
                num_layers=stage.num_layers,
                mask_type=AttnMaskType.no_mask,
                options=adapter,
            ),
            # Features are taken from the residual stream: there is no norm after the last layer.
            post_layer_norm=False,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            pg_collection=stage.pg_collection,
        )

    def embed(self, patches: Tensor) -> Tensor:
        """``[n, P - 1, values]`` to ``[n P, 1, H]``."""
        rows = self.patch_embedding(patches)
        first = self.class_embedding.expand(rows.shape[0], 1, -1)
        placed = torch.cat([first, rows], dim=1) + self.position_embedding
        normed: Tensor = self.input_norm(placed)
        return normed.reshape(-1, 1, normed.shape[-1])


class ClipStage(StageModule):
    """Layers ``[first_layer, first_layer + num_layers)`` of the vision tower.

    Args:
        config: From ``make_clip_config``, of all its layers.
        image_size: Pixels per side of an image.
        feature_layers: After how many layers each feature is taken, ascending.
        adapter: Shape of the adapters.
        gates: Whose gates weigh a row.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        patch_size: int,
        image_size: int,
        feature_layers: Sequence[int],
        adapter: AdapterOptions,
        gates: GateMode = "token",
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(config, **layers)
        self.rows_per_image = 1 + (image_size // patch_size) ** 2
        self.num_features = len(feature_layers)
        self._gates = gates
        held = range(layers["first_layer"] + 1, layers["first_layer"] + self.num_layers + 1)
        # Places among the features by layer, counted from 0 as Megatron does.
        self._features = {
            number - 1: place for place, number in enumerate(feature_layers) if number in held
        }
        self.vision_model = ClipModel(
            self, patch_size=patch_size, rows_per_image=self.rows_per_image, adapter=adapter
        )

    def initial_distribution(self, name: str) -> Callable[[Tensor], object] | None:
        """CLIP's embeddings are normal; of adapters see there."""
        if name in ("vision_model.class_embedding", "vision_model.position_embedding"):
            return partial(torch.nn.init.normal_, std=self.config.hidden_size**-0.5)
        return initial_distribution(name, self.config.hidden_size)

    def forward(
        self,
        hidden: Tensor | None,
        batch: "ClipBatch",
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Inner boundary rows, or the features ``[n F, 1, H]`` on the last stage.

        Raises:
            ValueError: Pixels are missing, or hidden states do not fit the batch.
        """
        assert upstream is None, "nothing is upstream of the vision module"
        num_images = len(batch.items)
        num_rows = self._num_rows(num_images * self.rows_per_image)
        hidden = self._take_input(hidden)
        if hidden is None:
            rows, features = self._first_rows(batch, num_rows), None
        else:
            own = num_rows // self.num_shards
            self._check(hidden, own, num_images)
            rows, features = hidden[:own], hidden[own:]
        rows, taken = self._run_layers(rows, num_images, num_rows)
        features = self._with_features(features, taken, num_images)
        return features if self.post_process else torch.cat([rows, features])

    def _first_rows(self, batch: "ClipBatch", num_rows: int) -> Tensor:
        weight = self.vision_model.patch_embedding.weight
        shape = (len(batch.items), self.rows_per_image - 1, weight.shape[1])
        patches = media_of_first_rank(batch.patches, shape, weight, self.tp_group, "patches")
        rows = pad_rows(self.vision_model.embed(patches), num_rows)
        if self.config.sequence_parallel:
            rows = scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        if torch.is_grad_enabled() and not rows.requires_grad:
            # All before the first adapter is frozen, and Megatron's recomputation builds a graph
            # from inputs that need gradients alone: the adapters in it would silently get none.
            # A leaf would stay until the backward, and get a gradient of its size: so is the zero.
            rows = rows.detach() + rows.new_zeros(1, requires_grad=True)
        return rows

    def _check(self, hidden: Tensor, own_rows: int, num_images: int) -> None:
        expected = own_rows + num_images * self.num_features
        if hidden.shape[0] != expected:
            raise ValueError(
                f"hidden states of {hidden.shape[0]} rows for {num_images} images; expected "
                f"{own_rows} rows and {self.num_features} features of each image: {expected}"
            )

    def _run_layers(
        self, rows: Tensor, num_images: int, num_rows: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The rows after the last layer, and those after every layer with a feature."""
        decoder = self.vision_model.decoder
        decoder.set_input_tensor(rows)
        routing = clip_routing(self._gates, num_images, self.rows_per_image, num_rows, rows.device)
        output = decoder(
            hidden_states=rows,
            attention_mask=None,
            packed_seq_params=routed_span_params(
                (self.rows_per_image,) * num_images,
                num_rows=num_rows,
                device=rows.device,
                routing=routing,
            ),
            extract_layer_indices=set(self._features),
        )
        decoder.set_input_tensor(None)
        after, taken = output if self._features else (output, [])
        if len(taken) != len(self._features):
            raise RuntimeError(
                f"features after layers {sorted(self._features)} were asked for, but Megatron gave "
                f"{len(taken)} (--recompute-method uniform only gives those at the ends of its "
                f"chunks: use block, or a --recompute-num-layers that divides them)"
            )
        return after, taken

    def _with_features(
        self, features: Tensor | None, taken: Sequence[Tensor], num_images: int
    ) -> Tensor:
        """``[n F, 1, H]``: those of earlier stages with what this stage has taken put in."""
        width = self.config.hidden_size
        shape = (num_images, self.num_features, width)
        if features is None:
            like = next(self.parameters())
            made = list(torch.zeros(shape, dtype=like.dtype, device=like.device).unbind(1))
        else:
            made = list(features.reshape(shape).unbind(1))
        for place, rows in zip(self._features.values(), taken, strict=True):
            made[place] = self._class_rows(rows, num_images)
        return torch.stack(made, dim=1).reshape(-1, 1, width)

    def _class_rows(self, rows: Tensor, num_images: int) -> Tensor:
        """``[n, H]``, whole on every tensor-parallel rank."""
        places = torch.arange(num_images, device=rows.device) * self.rows_per_image
        flat = rows.squeeze(1)
        if self.num_shards == 1:
            return flat[places]
        count = flat.shape[0]
        places = places - self.tp_group.rank() * count
        is_here = ((places >= 0) & (places < count)).unsqueeze(1)
        own = flat[places.clamp(0, count - 1)] * is_here
        # All ranks go on with the same rows, so each gets the whole gradient and keeps its part.
        whole: Tensor = reduce_from_tensor_model_parallel_region(own, group=self.tp_group)
        return whole
