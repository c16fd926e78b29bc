"""SpanAttention against a masked softmax written out."""

import math

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from models_setup import base_config, megatron_on_cpu

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.attention import SpanAttention, span_params
from megatron_dip.families.packed.configs import make_language_config

SPANS = (5, 3, 3, 1, 8, 8)
CHANNELS = 8


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


def attention_of(mask_type, num_groups=4, **changes):
    config = make_language_config(
        base_config(),
        num_layers=1,
        hidden_size=4 * CHANNELS,
        ffn_hidden_size=32,
        num_attention_heads=4,
        num_query_groups=num_groups,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return SpanAttention(config, 1, mask_type, "self")


def random_heads(num_groups=4, spans=SPANS):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(sum(spans), heads, CHANNELS, dtype=torch.float64, generator=generator)
        for heads in (4, num_groups, num_groups)
    ]


def masked_softmax(query, key, value, spans, is_causal):
    """Attention of all rows to all rows, with everything outside of the spans masked away."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    span_of_row = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(spans))
    allowed = span_of_row[:, None] == span_of_row[None, :]
    if is_causal:
        allowed = allowed.tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(CHANNELS)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_spans_attend_as_in_a_masked_softmax(mask_type, num_groups):
    heads = [part.requires_grad_() for part in random_heads(num_groups)]
    params = span_params(SPANS, num_rows=sum(SPANS), device="cpu")

    output = attention_of(mask_type, num_groups)(*heads, None, packed_seq_params=params)
    expected = masked_softmax(*heads, SPANS, mask_type == AttnMaskType.causal)

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((output * weights).sum(), heads)
    theirs = torch.autograd.grad((expected * weights).sum(), heads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_mask_type_of_the_call_overrides_that_of_the_module():
    heads = random_heads()
    params = span_params(SPANS, num_rows=sum(SPANS), device="cpu")
    attention = attention_of(AttnMaskType.causal)

    output = attention(*heads, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=params)

    expected = masked_softmax(*heads, SPANS, is_causal=False)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


def test_span_lengths_are_read_from_megatrons_own_parameters_too():
    heads = random_heads()
    ours = span_params(SPANS, num_rows=sum(SPANS), device="cpu")
    plain = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ours.cu_seqlens_q, cu_seqlens_kv=ours.cu_seqlens_kv
    )
    attention = attention_of(AttnMaskType.causal)
    torch.testing.assert_close(
        attention(*heads, None, packed_seq_params=plain),
        attention(*heads, None, packed_seq_params=ours),
        rtol=0,
        atol=0,
    )


def test_rows_left_over_are_a_span_of_their_own():
    params = span_params((3, 2), num_rows=8, device="cpu")
    assert params.span_lengths == (3, 2, 3)
    assert params.cu_seqlens_q.tolist() == [0, 3, 5, 8]
    assert params.max_seqlen_q == 3


def test_spans_longer_than_the_rows_are_refused():
    with pytest.raises(ValueError, match="5 rows in spans, but only 4"):
        span_params((3, 2), num_rows=4, device="cpu")


def test_no_rows_give_no_output():
    params = span_params((), num_rows=0, device="cpu")
    heads = random_heads(spans=(0,))
    output = attention_of(AttnMaskType.causal)(*heads, None, packed_seq_params=params)
    assert output.shape == (0, 4 * CHANNELS)


def test_dropout_changes_training_only():
    heads = random_heads()
    params = span_params(SPANS, num_rows=sum(SPANS), device="cpu")
    attention = attention_of(AttnMaskType.causal, attention_dropout=0.5)
    expected = masked_softmax(*heads, SPANS, is_causal=True)

    assert not torch.allclose(attention(*heads, None, packed_seq_params=params), expected)
    output = attention.eval()(*heads, None, packed_seq_params=params)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


def test_sliding_windows_are_refused():
    with pytest.raises(UnsupportedError, match="sliding windows"):
        attention_of(AttnMaskType.causal, window_size=(4, 0))


def test_rows_that_are_not_packed_are_refused():
    with pytest.raises(UnsupportedError, match="packed"):
        attention_of(AttnMaskType.causal)(*random_heads(), None)
