"""Attention and positions."""

from transformer_engine.pytorch.attention.core import DotProductAttention
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "apply_rotary_pos_emb"]
