"""What any layer keeps from its forward to its backward, from its widths.

Counted after Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198, section 4), who give 34 bytes in 16 bits per token and hidden channel beside the
scores of attention, with the widths of the layer in place of theirs: q channels of queries, k of
keys and values, f of the MLP (of all experts that a token is sent to).  Fused attention keeps a sum
per head and row of the scores (Dao et al., arXiv 2205.14135).
"""

from collections.abc import Iterator

from megatron_dip.costs.kept import Kept, KeptTensors
from megatron_dip.costs.kernels import RecomputedPart

__all__ = ["GenericKept"]

_FP32_BYTES = 4
_INDEX_BYTES = 8


class GenericKept(KeptTensors):
    """What one item leaves in the parts of a ``generic`` module on one rank."""

    def layer(self) -> tuple[Kept, ...]:
        """Without recomputation of whole layers."""
        return (*self._attention_and_norm(), *self._mlp_and_norm())

    def stage(self) -> tuple[Kept, ...]:
        """Nothing is known of what a stage keeps once."""
        return ()

    def _row(self, name: str, rows: float) -> Kept:
        return Kept(name, self._value * rows * self._module.hidden_size)

    def _attention_and_norm(self) -> Iterator[Kept]:
        layers, kernels = self._module.generic, self._kernels
        assert layers is not None
        value, inside = self._value, self._inside
        yield self._row("attention norm input", self._between)
        if self._trained:
            yield self._row("attention input", self._between)
        widths = layers.attention_size + layers.key_value_size
        yield Kept("queries, keys and values", value * inside * widths)
        is_repeated = kernels.recomputes("core_attn")
        if self._trained or not is_repeated:
            yield Kept("attention result", value * inside * layers.attention_size)
        if is_repeated:
            pass
        elif kernels.is_unfused or kernels.keeps_scores:
            copies = 2 * value + 1 if kernels.attention_dropout else value
            yield Kept("scores", copies * self._scores())
        else:
            heads = self._module.num_attention_heads
            yield Kept("sums of scores", _FP32_BYTES * inside * heads)
        yield from self._residual("attention")

    def _mlp_and_norm(self) -> Iterator[Kept]:
        layers = self._module.generic
        assert layers is not None
        yield self._row("MLP norm input", self._between)
        if self._trained:
            yield self._row("MLP input", self._between)
        part: RecomputedPart = "moe" if layers.expert_share < 1.0 else "mlp"
        if not self._kernels.recomputes(part):
            inner = self._value * self._inside * self._module.ffn_hidden_size
            yield Kept("MLP before its activation", (2 if layers.is_gated else 1) * inner)
            if self._trained:
                yield Kept("MLP after its activation", inner)
        yield from self._residual("MLP")

    def first_extra(self) -> tuple[Kept, ...]:
        """What sits before the first layer, where it is trained."""
        if not self._module.trains_first_extra:
            return ()
        if self._module.vocab_size is None:
            return (self._row("embedding input", self._whole),)
        kept = [Kept("token numbers", _INDEX_BYTES * self._whole)]
        if self._has_dropout:
            mask = self._kernels.mask_bytes * self._whole * self._module.hidden_size
            kept.append(Kept("embedding dropout mask", mask))
        return tuple(kept)

    def last_extra(self) -> tuple[Kept, ...]:
        """What sits after the last layer: a norm, and a head or a projection of rows."""
        module = self._module
        kept = [self._row("final norm input", self._between)]
        if module.trains_last_extra:
            kept.append(self._row("last input", self._between))
        if module.vocab_size is not None and module.has_head:
            # Probabilities in 32 bits, the target, and whether it is on this rank.
            kept.append(Kept("probabilities", _FP32_BYTES * self._inside * module.vocab_size))
            kept.append(Kept("targets", (_INDEX_BYTES + 1) * self._whole))
        return tuple(kept)
