"""How the layers of a run compute, as far as it decides what they keep for their backward.

Two kinds of layers exist.  ``local`` ones are made of torch's own operations: every step keeps what
its own backward reads.  Layers of Transformer Engine fuse steps, and keep less.  On a CPU dropout
keeps a mask as wide as its input, and attention with dropout keeps its scores, because torch's
fused kernel for CPUs has no dropout; on a GPU a mask has one byte per value, and fused attention
draws its dropout again in backward.
"""

from typing import Literal

from megatron_dip.forms import Form

__all__ = ["Kernels", "RecomputedPart"]

RecomputedPart = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
"""What ``--recompute-modules`` may name where layers have no latent attention."""

_FP32_BYTES = 4
_BF16_BYTES = 2


class Kernels(Form):
    """What a run says of its kernels; by default bf16 on a GPU, fused, without dropout."""

    is_fp32: bool = False
    """Weights and activations in fp32; in 16 bits otherwise."""
    is_unfused: bool = False
    """Layers made of torch's own operations, without Transformer Engine."""
    on_cpu: bool = False
    hidden_dropout: bool = False
    """After embedding, attention and MLP of ``causal`` modules, after the latter two of ``vit``."""
    attention_dropout: bool = False
    """Of the scores."""
    fuses_activation: bool = True
    """The activation of an MLP is one kernel (``bias_gelu_fusion``, ``bias_swiglu_fusion``)."""
    fuses_rotary: bool = True
    """Rotary positions are one kernel (``apply_rope_fusion``); never in ``dit`` modules."""
    keeps_scores: bool = False
    """Attention is not fused (``--attention-backend unfused``)."""
    recompute: Literal["selective", "full"] | None = None
    """Megatron's ``--recompute-granularity``."""
    recomputed_parts: frozenset[RecomputedPart] = frozenset()
    """Of ``selective``."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Of ``full``."""
    recompute_num_layers: int = 1
    """Of ``full``: layers of a chunk, or layers of a stage that are recomputed."""

    @property
    def bytes_per_value(self) -> int:
        """Of weights and activations."""
        return _FP32_BYTES if self.is_fp32 else _BF16_BYTES

    @property
    def mask_bytes(self) -> int:
        """Of a dropout mask, per value."""
        return self.bytes_per_value if self.on_cpu else 1

    def recomputes(self, part: RecomputedPart) -> bool:
        """Whether Megatron's selective recomputation repeats ``part``."""
        return self.recompute == "selective" and part in self.recomputed_parts
