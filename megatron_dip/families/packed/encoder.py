"""What encoders of images and of audio share: full attention inside items, and rows for a reader.

With sequence parallelism items are embedded in full on every tensor-parallel rank, blocks run on
shards of the rows, and the rows are gathered after the final norm.  Notation: N tokens of a
sub-microbatch, H the hidden size, H_l that of the module that reads the features.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Unpack

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_dip.families.packed.attention import span_params
from megatron_dip.families.packed.layers import (
    block_submodules,
    linear_layers,
)
from megatron_dip.families.packed.shapes import padded_rows
from megatron_dip.families.packed.stage import (
    StageLayers,
    StageModule,
    pad_rows,
    row_multiple,
)

__all__ = ["EncoderModel", "EncoderStage", "build_projection"]


class EncoderModel(MegatronModule):
    """Embedding (first stage), layers, final norm (last stage).

    Args:
        embedding: By name, what :meth:`embed` computes with, on the first stage.  Weights are read
            in the order in which they come: it stands before the layers.
    """

    def __init__(self, stage: StageModule, **embedding: Module) -> None:
        config = stage.config
        super().__init__(config=config)
        for name, module in embedding.items():
            self.add_module(name, module)
        self.tp_group = stage.tp_group
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(
                config, num_layers=stage.num_layers, mask_type=AttnMaskType.no_mask
            ),
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            pg_collection=stage.pg_collection,
        )

    @abstractmethod
    def embed(self, batch: Any) -> Tensor:
        """The rows of a batch: ``[N, H]``."""

    def rotary_angles(self, batch: Any, device: torch.device) -> Tensor | None:
        """By which every row turns queries and keys: ``[N, 1, 1, channels]``; None: by nothing."""
        return None

    def forward(
        self,
        hidden: Tensor | None,
        batch: Any,
        num_rows: int,
    ) -> Tensor:
        """``[rows of this rank, 1, H]``; ``hidden`` is None on the first stage."""
        if hidden is None:
            hidden = pad_rows(self.embed(batch), num_rows).unsqueeze(1)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        spans = span_params(batch.span_lengths, num_rows=num_rows, device=hidden.device)
        angles = self.rotary_angles(batch, hidden.device)
        if angles is not None:
            angles, spans.rotary_places = pad_rows(angles, num_rows), slice(None)
        self.decoder.set_input_tensor(hidden)
        output: Tensor = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=spans,
        )
        self.decoder.set_input_tensor(None)
        return output


class EncoderStage(StageModule):
    """Some layers of an encoder; the last stage joins groups of rows and projects them.

    Args:
        config: The module's config, of all its layers.
        projection_config: The projector's config; its hidden size is that of the language module.
        name: Its parts are ``<name>_model`` and ``<name>_projection`` in checkpoints.
        tokens_per_row: Neighbouring tokens that are joined into one row of features.
        make_model: Makes the former for this stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projection_config: TransformerConfig,
        *,
        name: str,
        tokens_per_row: int,
        make_model: Callable[[StageModule], EncoderModel],
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(config, **layers)
        self._name, self._tokens_per_row = name, tokens_per_row
        self.add_module(f"{name}_model", make_model(self))
        if self.post_process:
            projection = build_projection(
                projection_config, tokens_per_row * config.hidden_size, self.pg_collection
            )
            self.add_module(f"{name}_projection", projection)

    def forward(
        self,
        hidden: Tensor | None,
        batch: Any,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Inner boundary rows, or features ``[rows, 1, H_l]`` on the last stage (see ``shapes``).

        Raises:
            ValueError: Data or hidden states that do not fit the batch's items.
        """
        assert upstream is None, "nothing is upstream of an encoder"
        hidden = self._take_input(hidden)
        num_tokens = sum(batch.span_lengths)
        if hidden is not None:
            self._check_rows(hidden, num_tokens)
        num_rows = self._num_rows(num_tokens)
        model = self.get_submodule(f"{self._name}_model")
        output: Tensor = model(hidden, batch, num_rows)
        return self._project(output, num_tokens) if self.post_process else output

    def _project(self, hidden: Tensor, num_tokens: int) -> Tensor:
        if self.config.sequence_parallel:
            # Every rank projects all rows, and the projector adds up its ranks' input gradients
            # itself: the gradient that arrives here is complete and only has to be split.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        num_features = num_tokens // self._tokens_per_row
        joined = hidden[:num_tokens].reshape(num_features, 1, -1)
        # The projector computes in 8 bits where the layers do, on rows of its own number.
        filled = pad_rows(joined, padded_rows(num_features, row_multiple(self.config)))
        features: Tensor = self.get_submodule(f"{self._name}_projection")(filled)
        return features if len(filled) == num_features else features[:num_features]


def build_projection(
    config: TransformerConfig, input_size: int, pg_collection: ProcessGroupCollection
) -> MultimodalProjector:
    """Two linear layers from groups of ``input_size`` values to the reader's width."""
    assert not config.sequence_parallel, "the projector runs on all rows; see configs"
    column, row = linear_layers(config)
    submodules = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    return MultimodalProjector(config, submodules, "mlp", input_size, tp_group=pg_collection.tp)
