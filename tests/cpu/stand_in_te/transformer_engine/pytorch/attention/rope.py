"""Rotary positions: packed sequences start anew from position 0."""

import torch

fused_calls = []
"""Formats of the calls so far."""


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    assert start_positions is None and not interleaved and cp_size == 1
    assert freqs.dtype == torch.float32, "the fused kernel reads angles in 32 bits"
    assert fused
    fused_calls.append(tensor_format)
    if tensor_format == "sbhd":
        return _rotate(t, freqs[: len(t)])
    assert tensor_format == "thd" and cu_seqlens.dtype == torch.int32
    places = [torch.arange(length) for length in cu_seqlens.diff().tolist()]
    return _rotate(t, freqs[torch.cat(places)].squeeze(1))


def _rotate(t, freqs):
    width = freqs.shape[-1]
    rotated, rest = t[..., :width], t[..., width:]
    cos, sin = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
