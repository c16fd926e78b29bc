"""The layer of a diffusion transformer, from Megatron's attention and MLP.

A layer is self-attention inside each clip, cross-attention to the clip's text, and an MLP, each on
a residual branch.  The first and the last are modulated by the timestep: their input is normalised
without learned weights, scaled and shifted, and their output is gated.  The six vectors are the
sum of a network's output, shared by all layers, and of a table of the layer's own (AdaLN-single,
arXiv 2310.00426).  Cross-attention reads a plain norm and is not gated.

Notation: T rows of this rank, M text rows, C clips, H the hidden size.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_dip.families.packed.layers import block_submodules, linear_layers
from megatron_dip.families.packed.shapes import padded_rows
from megatron_dip.families.packed.stage import pad_rows, row_multiple

__all__ = ["MODULATIONS", "DitContext", "DitLayer", "dit_block_submodules", "normalize"]

MODULATIONS = 6
"""Shift, scale and gate of self-attention and of the MLP."""


class DitContext(NamedTuple):
    """What all layers read beside their hidden states."""

    text: Tensor
    """``[M, 1, H]``, equal on all tensor-parallel ranks."""
    modulation: Tensor
    """``[C, 6, H]``, the shared part, equal on all tensor-parallel ranks."""
    clips: Tensor
    """``[T]`` int64: the clip of every row of this rank."""
    text_spans: PackedSeqParams
    """Which text rows the rows of each clip read."""


@dataclass
class DitLayerSubmodules:
    """Megatron's specs of the parts."""

    self_attention: ModuleSpec
    cross_attention: ModuleSpec
    mlp: MLPSubmodules


class DitLayer(MegatronModule, BaseTransformerLayer):
    """One layer."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DitLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        self.tp_group = pg_collection.tp
        parts: dict[str, Any] = {"config": config, "layer_number": self.layer_number}
        self.self_attention = build_module(
            submodules.self_attention, **parts, pg_collection=pg_collection
        )
        self.cross_attention = build_module(
            submodules.cross_attention, **parts, pg_collection=pg_collection
        )
        self.mlp = MLP(
            config,
            submodules.mlp,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )
        shape = (MODULATIONS, config.hidden_size)
        self.modulation_table = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))

    def forward(
        self,
        hidden_states: Tensor,
        context: DitContext,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> tuple[Tensor, DitContext]:
        """``[T, 1, H]`` to ``[T, 1, H]``; the context is handed on to the next layer.

        ``rotary_pos_emb`` has a row ``[1, 1, channels]`` for every row of the sub-microbatch, and
        ``packed_seq_params`` are the clips.  What else ``TransformerBlock`` passes does not apply.
        """

        output = self._run(hidden_states, context, rotary_pos_emb, packed_seq_params)
        return output, context

    def _run(
        self, hidden: Tensor, context: DitContext, rotary: Tensor, spans: PackedSeqParams
    ) -> Tensor:
        modulation = context.modulation + self.modulation_table
        if self.config.sequence_parallel:
            # Every rank modulates its own rows, so that its gradient is a part of the sum.
            modulation = copy_to_tensor_model_parallel_region(modulation, group=self.tp_group)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            vectors.index_select(0, context.clips).unsqueeze(1) for vectors in modulation.unbind(1)
        )
        output, bias = self.self_attention(
            normalize(hidden, self.config) * (1 + scale) + shift,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=spans,
        )
        hidden = hidden + gate * (output + bias)
        output, bias = self.cross_attention(
            normalize(hidden, self.config),
            attention_mask=None,
            key_value_states=context.text,
            packed_seq_params=context.text_spans,
        )
        hidden = hidden + output + bias
        output, bias = self.mlp(normalize(hidden, self.config) * (1 + mlp_scale) + mlp_shift)
        return hidden + mlp_gate * (output + bias)


def normalize(hidden: Tensor, config: TransformerConfig) -> Tensor:
    """Every row to mean 0 and variance 1, without learned weights."""
    shape = (hidden.shape[-1],)
    return torch.nn.functional.layer_norm(hidden, shape, eps=config.layernorm_epsilon)


def dit_block_submodules(
    config: TransformerConfig, *, num_layers: int
) -> TransformerBlockSubmodules:
    """What a ``TransformerBlock`` of ``num_layers`` such layers is built from; no final norm.

    Raises:
        UnsupportedError: Experts, or an attention that is not plain self-attention.
    """
    plain = block_submodules(config, num_layers=1, mask_type=AttnMaskType.no_mask)
    self_attention: ModuleSpec = plain.layer_specs[0].submodules.self_attention
    column, row = linear_layers(config)
    # The norm before it is modulated, so that it cannot be fused with the layer.
    self_attention.submodules.linear_qkv = column
    cross_attention = ModuleSpec(
        module=CrossAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=CrossAttentionSubmodules(
            linear_q=column,
            linear_kv=_WholeRows(column),
            core_attention=self_attention.submodules.core_attention,
            linear_proj=row,
        ),
    )
    spec = ModuleSpec(
        module=DitLayer,
        submodules=DitLayerSubmodules(
            self_attention=self_attention,
            cross_attention=cross_attention,
            mlp=MLPSubmodules(linear_fc1=column, linear_fc2=row),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers)


class _WholeRows:
    """Builds a linear layer whose input rows every tensor-parallel rank holds whole.

    With 8-bit kernels their number is filled up inside the layer, so that text travels and is read
    as it is.
    """

    def __init__(self, linear: Any) -> None:
        self._linear = linear

    def __call__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        plain.tp_comm_overlap = False
        layer = self._linear(*args, config=plain, **kwargs)
        multiple = row_multiple(config)
        if multiple > 1:
            layer.forward = partial(_fill_up, layer.forward, multiple)
        return layer


def _fill_up(
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]], multiple: int, rows: Tensor
) -> tuple[Tensor, Tensor | None]:
    output, bias = forward(pad_rows(rows, padded_rows(len(rows), multiple)))
    return output[: len(rows)], bias
