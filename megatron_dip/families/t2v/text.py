"""Stages of a text encoder: a language backbone without its head, whose last features go on.

The parts have the names of :class:`LanguageStage`, so that the weights of a language model can be
loaded.  Notation: M tokens, H the hidden size.
"""

from typing import TYPE_CHECKING, Unpack

from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.packed.attention import span_params
from megatron_dip.families.packed.language import build_backbone
from megatron_dip.families.packed.layers import block_submodules
from megatron_dip.families.packed.stage import StageLayers, StageModule, pad_rows

if TYPE_CHECKING:
    from megatron_dip.families.t2v.batches import TextBatch

__all__ = ["TextStage"]


class TextStage(StageModule):
    """Layers ``[first_layer, first_layer + num_layers)`` of the text encoder.

    The first stage embeds tokens, the last one has the final norm.  Both may have no layers.

    Args:
        config: The module's config, of all its layers.
        vocab_size: Padded to a multiple of the tensor-parallel size.
        max_sequence_length: Tokens of the longest text.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        max_sequence_length: int,
        rotary_base: int = 10000,
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(config, **layers)
        self.language_model = build_backbone(
            self,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            rotary_base=rotary_base,
            has_head=False,
        )
        if self.post_process:
            # Megatron ties the final norm to the head, which would be as large as the embedding.
            spec = block_submodules(self.config, num_layers=0, mask_type=AttnMaskType.causal)
            self.language_model.decoder.final_layernorm = spec.layer_norm(
                self.config, config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(
        self,
        hidden: Tensor | None,
        batch: "TextBatch",
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Inner boundary rows, or features ``[M, 1, H]`` on the last stage.

        Raises:
            ValueError: Hidden states that do not fit the batch.
        """
        assert upstream is None, "nothing is upstream of the text encoder"
        hidden = self._take_input(hidden)
        num_tokens = len(batch.tokens)
        num_rows = self._num_rows(num_tokens)
        model = self.language_model
        if hidden is None:
            hidden = model.embedding(
                input_ids=pad_rows(batch.tokens, num_rows).unsqueeze(0),
                position_ids=pad_rows(batch.position_ids, num_rows).unsqueeze(0),
            )
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            self._check_rows(hidden, num_tokens)
        model.set_input_tensor(hidden)
        output: Tensor = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=hidden,
            packed_seq_params=span_params(
                batch.span_lengths,
                num_rows=num_rows,
                device=hidden.device,
                has_places=not self.config.apply_rope_fusion,
            ),
        )
        model.set_input_tensor(None)
        return self._gather(output)[:num_tokens] if self.post_process else output

    def _gather(self, features: Tensor) -> Tensor:
        """All rows on every rank: which of them reads which, cross-attention decides."""
        if not self.config.sequence_parallel:
            return features
        gathered: Tensor = gather_from_sequence_parallel_region(
            features, tensor_parallel_output_grad=False, group=self.tp_group
        )
        return gathered
