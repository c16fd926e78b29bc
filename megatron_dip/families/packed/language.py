"""Stages of the language backbone: slices of Megatron's ``GPTModel`` on packed rows.

Attention is causal inside a span and rotary positions restart with every span.  Rows that stand
for images get the image features in place of the word embedding.  With sequence parallelism, rows
are padded to a multiple of the tensor-parallel size by one more span whose losses are dropped.
Context-parallel ranks hold other rows of the same spans; each reads the features that fall on them.
Notation: T tokens, M image rows, H the hidden size.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Unpack

import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.attention import SpanParams, span_params
from megatron_dip.families.packed.layers import block_submodules
from megatron_dip.families.packed.stage import StageLayers, StageModule, pad_rows

if TYPE_CHECKING:
    from megatron_dip.families.vlm.batches import LanguageBatch

__all__ = ["LanguageStage", "build_backbone"]


def build_backbone(
    stage: StageModule,
    *,
    vocab_size: int,
    max_sequence_length: int,
    rotary_base: int,
    has_head: bool,
    tie_embeddings: bool = False,
    make_block: Callable[..., TransformerBlockSubmodules] = block_submodules,
) -> GPTModel:
    """Megatron's model with the layers of ``stage``; see :class:`LanguageStage`."""
    with _without_deprecation_warning():
        return GPTModel(
            stage.config,
            make_block(stage.config, num_layers=stage.num_layers, mask_type=AttnMaskType.causal),
            vocab_size,
            max_sequence_length,
            pre_process=stage.pre_process,
            post_process=has_head,
            parallel_output=True,
            share_embeddings_and_output_weights=tie_embeddings,
            position_embedding_type="rope",
            rotary_base=rotary_base,
            # Image features are put in between embedding and scatter.
            scatter_embedding_sequence_parallel=False,
            pg_collection=stage.pg_collection,
        )


def counts_rows(config: TransformerConfig) -> bool:
    """Whether the routers of experts average over rows, and must leave out padding."""
    if config.num_moe_experts is None:
        return False
    coefficients = config.moe_aux_loss_coeff
    total = sum(coefficients) if isinstance(coefficients, list) else coefficients
    return bool(total or config.moe_z_loss_coeff)


class LanguageStage(StageModule):
    """Layers ``[first_layer, first_layer + num_layers)`` of the language backbone.

    The first stage embeds tokens and puts image features in, the last one has the head and the
    vocabulary-parallel loss.  Both may have no layers.

    Args:
        config: The language module's config, of all its layers.
        vocab_size: Padded to a multiple of the tensor-parallel size.
        max_sequence_length: Tokens of the longest packed sequence.
        tie_embeddings: Let embedding and head share one weight.
        make_block: What the layers are made of.

    Raises:
        PartitionError: The module does not have these layers.
        UnsupportedError: Routers would count padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        max_sequence_length: int,
        rotary_base: int = 10000,
        tie_embeddings: bool = False,
        make_block: Callable[..., TransformerBlockSubmodules] = block_submodules,
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(config, **layers)
        self.share_embeddings_and_output_weights = tie_embeddings
        self._masks_padding = counts_rows(config)
        if self._masks_padding and "padding_mask" not in signature(GPTModel.forward).parameters:
            raise UnsupportedError(
                "this Megatron cannot tell a router which rows are padding: set "
                "--moe-aux-loss-coeff 0 and leave --moe-z-loss-coeff out"
            )
        self.language_model = build_backbone(
            self,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            rotary_base=rotary_base,
            has_head=self.post_process,
            tie_embeddings=tie_embeddings,
            make_block=make_block,
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding's weight on the first stage, the head's on the last one."""
        weight: Tensor | None = self.language_model.shared_embedding_or_output_weight()
        return weight

    def forward(
        self,
        hidden: Tensor | None,
        batch: "LanguageBatch",
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Inner boundary rows, or the loss of every token ``[T]`` on the last stage.

        ``upstream`` holds the image features ``[M, 1, H]`` (or ``[M, H]``) in the order of
        ``batch.image_rows``.  Losses are neither masked nor summed.

        Raises:
            ValueError: Hidden states or image features that do not fit the batch.
        """
        hidden = self._take_input(hidden)
        num_rows = self._num_rows(len(batch.tokens))
        if hidden is None:
            hidden = self._embed(batch, upstream, num_rows)
        else:
            self._check_rows(hidden, len(batch.tokens))
        model = self.language_model
        model.set_input_tensor(hidden)
        # Not every Megatron has this argument, so it is given only where it means something.
        padding = {"padding_mask": self._padding(batch, num_rows)} if self._masks_padding else {}
        labels = pad_rows(batch.labels, num_rows).unsqueeze(0) if self.post_process else None
        output: Tensor = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden,
            labels=labels,
            packed_seq_params=self._spans(batch, num_rows, hidden.device),
            **padding,
        )
        model.set_input_tensor(None)
        return output.reshape(-1)[: len(batch.tokens)] if self.post_process else output

    def _padding(self, batch: "LanguageBatch", num_rows: int) -> Tensor:
        """``[1, rows of this rank]`` bool: those that a router must not count."""
        own = num_rows // self.num_shards
        filled = batch.is_padding.new_ones(num_rows)
        filled[: len(batch.tokens)] = batch.is_padding
        return filled.split(own)[self.tp_group.rank() if self.num_shards > 1 else 0].unsqueeze(0)

    def _spans(self, batch: "LanguageBatch", num_rows: int, device: torch.device) -> SpanParams:
        """What every layer is told about the rows."""
        return span_params(
            batch.span_lengths,
            num_rows=num_rows * batch.num_context_ranks,
            device=device,
            is_divided=batch.num_context_ranks > 1,
            # Rows that ranks share are rotated by Megatron, which knows whose they are.
            has_places=not self.config.apply_rope_fusion and batch.num_context_ranks == 1,
        )

    def _embed(self, batch: "LanguageBatch", upstream: Tensor | None, num_rows: int) -> Tensor:
        """``[rows of this rank, 1, H]``."""
        num_features = 0 if upstream is None else upstream.shape[0]
        if num_features != batch.num_features:
            raise ValueError(
                f"{num_features} rows of image features for {batch.num_features} image rows: "
                f"the vision stage's outputs for images {batch.images} must be joined in this order"
            )
        tokens = pad_rows(batch.tokens, num_rows).unsqueeze(0)
        positions = pad_rows(batch.position_ids, num_rows).unsqueeze(0)
        embedded: Tensor = self.language_model.embedding(input_ids=tokens, position_ids=positions)
        embedded = self._put_in(embedded, batch, upstream)
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded, group=self.tp_group)
        return embedded

    def _put_in(self, embedded: Tensor, batch: "LanguageBatch", upstream: Tensor | None) -> Tensor:
        """The rows ``[padded T, 1, H]`` with those replaced that stand for no word."""
        if upstream is None:
            return embedded
        features = upstream.reshape(-1, 1, upstream.shape[-1]).to(embedded.dtype)
        if batch.feature_rows is not None:
            features = features.index_select(0, batch.feature_rows)
        return embedded.index_copy(0, batch.image_rows, features)


@contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """Keep back the one line with which every ``GPTModel`` points to Megatron's ``HybridModel``.

    The model is used here on purpose, for the sake of its checkpoint keys, and once per stage.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in record.getMessage()

    # 0.19 and later say it.
    logger = logging.getLogger(gpt_model.__name__)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
