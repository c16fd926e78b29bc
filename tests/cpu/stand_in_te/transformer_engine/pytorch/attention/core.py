"""Attention, of packed rows (``thd``) and of batches (``sbhd``)."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention


class DotProductAttention(torch.nn.Module):
    """Checks what the kernels of Transformer Engine demand of packed rows."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        bottom_right_diagonal=None,
        softcap=0.0,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
        name=None,
    ):
        super().__init__()
        assert window_size in (None, (-1, -1)) and softmax_type == "vanilla" and cp_group is None
        self.qkv_format, self.attention_type = qkv_format, attention_type
        self.attention_dropout = attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(kv_channels)

    def forward(
        self,
        query_layer,
        key_layer=None,
        value_layer=None,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        bottom_right_diagonal=None,
        softcap=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        bf16_backward=None,
        num_splits=1,
    ):
        assert core_attention_bias is None and attention_mask is None
        settings = {"is_causal": "causal" in attn_mask_type, "scale": self.softmax_scale}
        if self.training:
            settings["dropout_p"] = self.attention_dropout
        if (qkv_format or self.qkv_format) == "sbhd":
            parts = [part.permute(1, 2, 0, 3) for part in (query_layer, key_layer, value_layer)]
            found = _attend(*parts, **settings)
            return found.permute(2, 0, 1, 3).flatten(2)
        assert qkv_format == "thd" and attn_mask_type in ("padding", "padding_causal")
        spans = [_checked(cu_seqlens_q, max_seqlen_q, query_layer)]
        spans.append(_checked(cu_seqlens_kv, max_seqlen_kv, key_layer))
        outputs = []
        starts = [0, 0]
        for length, context in zip(*spans, strict=True):
            rows = slice(starts[0], starts[0] + length)
            read = slice(starts[1], starts[1] + context)
            starts = [rows.stop, read.stop]
            parts = [query_layer[rows], key_layer[read], value_layer[read]]
            if not context:
                outputs.append(query_layer.new_zeros(parts[0].shape))
                continue
            parts = [part.transpose(0, 1)[None] for part in parts]
            outputs.append(_attend(*parts, **settings)[0].transpose(0, 1))
        return torch.cat([*outputs, query_layer[:0]]).flatten(1)


def _checked(bounds, longest, rows):
    """Lengths of the sequences that ``bounds`` are the ends of."""
    assert bounds.dtype == torch.int32 and bounds.dim() == 1 and bounds[0] == 0
    # Numbers, because reading them off a tensor would stop the host.
    assert type(longest) is int and rows.dim() == 3 and bounds[-1] == len(rows)
    lengths = bounds.diff().tolist()
    assert longest == max(lengths, default=0)
    return lengths


def _attend(query, key, value, **settings):
    return scaled_dot_product_attention(
        query, key, value, enable_gqa=query.shape[1] != key.shape[1], **settings
    )
