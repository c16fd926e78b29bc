"""What Megatron's local layers lack and those of Transformer Engine have, where scripts ask for it.

A script whose layers are Transformer Engine's on a GPU runs on the CPU with ``--transformer-impl
local``; these are the differences that would end it.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["complete_local_layers"]


def complete_local_layers() -> None:
    """Patch the classes; Megatron must have been imported on the CPU before."""
    _give_norms_of_torch()
    _let_values_have_their_own_width()
    _attend_within_packed_sequences()
    _leave_what_follows_packed_sequences()


def _give_norms_of_torch() -> None:
    """Some models take a norm of Transformer Engine whatever their layers are made of.

    CLIP takes torch's own where there is none, which knows no configuration.
    """
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new_of_torch(
        cls: type, config: Any, hidden_size: int, eps: float = 1e-5, has_residual: bool = False
    ) -> Any:
        return WrappedTorchNorm(config, hidden_size, eps)

    TENorm.__new__ = new_of_torch
    init = CLIPViTModel.__init__
    init.__defaults__ = tuple(
        WrappedTorchNorm if default is torch.nn.LayerNorm else default
        for default in init.__defaults__ or ()
    )


def _let_values_have_their_own_width() -> None:
    """Multi-latent attention states the widths of keys and values, which differ."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init = DotProductAttention.__init__

    @functools.wraps(init)
    def init_with_widths(
        self: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        init(self, *args, **kwargs)
        if v_channels is not None:
            # Only the shape of the output is taken from it; scores take the width of the queries.
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = init_with_widths


def _attend_within_packed_sequences() -> None:
    """Sequences laid one behind the other attend each to itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    forward = DotProductAttention.forward
    causal_types = (AttnMaskType.causal, AttnMaskType.padding_causal)

    @functools.wraps(forward)
    def forward_packed(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            mask, kind = attention_mask, attn_mask_type or self.attn_mask_type
            if mask is None and kind == AttnMaskType.padding_causal:
                # What is padded stands at the end, where nothing looks at it.
                mask = _causal_mask(query.size(0))
            output: Tensor = forward(self, query, key, value, mask, attn_mask_type, attention_bias)
            return output
        is_causal = (attn_mask_type or self.attn_mask_type) in causal_types
        # [tokens, heads, width], after the last sequence what belongs to none.
        outputs, end = [], 0
        for queries, keys in zip(*_runs(packed_seq_params), strict=True):
            if queries.start == queries.stop:
                continue
            mask = _causal_mask(queries.stop - queries.start) if is_causal else None
            one = (query[queries], key[keys], value[keys])
            outputs.append(forward(self, *(part.unsqueeze(1) for part in one), mask).squeeze(1))
            end = queries.stop
        rest = query.new_zeros(query.size(0) - end, self.hidden_size_per_partition)
        return torch.cat([*outputs, rest])

    DotProductAttention.forward = forward_packed


def _leave_what_follows_packed_sequences() -> None:
    """Tokens after the last sequence have no position; Megatron's own code counts none of them."""
    from megatron.core.models.common.embeddings import rope_utils

    rotate = rope_utils._apply_rotary_pos_emb_thd

    @functools.wraps(rotate)
    def rotate_sequences(tokens: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        end = int(cu_seqlens[-1])
        return torch.cat([rotate(tokens[:end], cu_seqlens, *args, **kwargs), tokens[end:]])

    rope_utils._apply_rotary_pos_emb_thd = rotate_sequences


def _causal_mask(length: int) -> Tensor:
    """True where a token must not look."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _runs(packed_seq_params: Any) -> tuple[list[slice], list[slice]]:
    """Where each sequence stands, padding behind it included: among queries, and among keys."""
    found = []
    for name in ("q", "kv"):
        bounds = getattr(packed_seq_params, f"cu_seqlens_{name}_padded")
        if bounds is None:
            bounds = getattr(packed_seq_params, f"cu_seqlens_{name}")
        starts = bounds.tolist()
        found.append([slice(a, b) for a, b in pairwise(starts)])
    return found[0], found[1]
