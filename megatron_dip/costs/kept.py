"""What layers keep from their forward to their backward, tensor by tensor.

Notation, per item: n tokens, h hidden, k width of keys (and of values), f of the MLP, a heads, d
channels of a head, L the length of a span, b bytes per value.  Rows: ``whole`` are all that a rank
has without tensor parallelism, ``inside`` stands for a tensor-parallel region, whose width is
divided, ``between`` for what sequence parallelism divides as well.

Layers of Transformer Engine: counted after Korthikanti et al., "Reducing Activation Recomputation
in Large Transformer Models" (arXiv 2205.05198, section 4): with dropout and GELU 34 b s h bytes in
16 bits beside the scores, of which fused attention (Dao et al., arXiv 2205.14135) keeps but a sum
per head and row.  ``local`` layers: as torch's operations keep it, which a test compares with what
autograd holds.  Frozen layers that pass a gradient on keep no inputs of linear layers; an adapter
keeps the rows that it reads.

Not counted: rows of a neck and of features, and outputs of stages that wait to be sent.
"""

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

from megatron_dip.costs.kernels import Kernels
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.shape_parts import NUM_EXPERTS, TIMESTEP_VALUES
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.costs.sizes import ItemSize

__all__ = ["Kept", "KeptTensors"]

_FP32_BYTES = 4
_INDEX_BYTES = 8


class Kept(NamedTuple):
    """One tensor, or several of a kind."""

    name: str
    num_bytes: float


class KeptTensors:
    """What one item leaves in the parts of one module on one rank.

    Args:
        is_entered: Whether gradients go on from what sits after the last layer to the layers.
    """

    def __init__(
        self,
        module: ModuleShape,
        size: ItemSize,
        parallel: Parallelism,
        kernels: Kernels,
        *,
        is_entered: bool = True,
    ) -> None:
        if module.is_only_used:
            # It runs without dropout, whatever the run says.
            kernels = kernels.model_copy(
                update={"hidden_dropout": False, "attention_dropout": False}
            )
        self._module, self._size, self._kernels = module, size, kernels
        self._trained = module.trains_layers
        self._parts = module.trained.parts
        self._is_entered = is_entered
        self._value = kernels.bytes_per_value
        parallel = parallel.of(module)
        self._tensor = parallel.tensor
        self._whole = size.tokens / parallel.context
        self._inside = self._whole / parallel.tensor
        self._between = size.tokens / parallel.sequence_shards
        self._has_dropout = kernels.hidden_dropout and module.kind != "dit"

    # ---- one layer --------------------------------------------------------------------------

    def layer(self) -> tuple[Kept, ...]:
        """Without recomputation of whole layers."""
        return (*self._attention(), *self._cross_attention(), *self._feed_forward())

    def stage(self) -> tuple[Kept, ...]:
        """What a stage keeps once for all of its layers."""
        module, rows = self._module, self._whole
        if module.kind == "dit":
            # Text and times of a clip come below its rows, whole on every rank.
            below = self._size.context_tokens + module.conditioning_rows * len(self._size.spans)
            return (
                Kept("text and times", self._value * below * module.hidden_size),
                Kept("clips of rows", _INDEX_BYTES * rows),
            )
        if not module.is_rotary:
            return ()
        is_repeated = self._kernels.recompute == "full"
        # Encoders have a row of the table for every patch, and a fused kernel keeps it as it is.
        if is_repeated or (module.kind == "vit" and self._kernels.fuses_rotary):
            num_places = rows if module.kind == "vit" else max(self._size.spans, default=0)
            channels = module.hidden_size // module.num_attention_heads
            return (Kept("rotary positions", _FP32_BYTES * num_places * channels),)
        return ()

    def recomputed_layer(self) -> tuple[Kept, ...]:
        """Its input alone."""
        return (Kept("input", self._value * self._between * self._module.hidden_size),)

    def _attention(self) -> Iterator[Kept]:
        hidden, value = self._module.hidden_size, self._value
        yield from self._layer_norm("attention norm")
        if self._module.adapter is not None:
            yield from self._adapter()
        yield from self._modulation("attention")
        yield from self._linear_input("attention input")
        if self._module.is_rotary and not self._fuses_rotary:
            # Sines and cosines, for queries and for keys.
            channels = hidden // self._module.num_attention_heads
            yield Kept("rotary angles", value * self._whole * 4 * channels)
        yield from self._core()
        yield from self._joined_heads("attention output")
        yield from self._residual("attention")

    @property
    def _fuses_rotary(self) -> bool:
        return self._kernels.fuses_rotary and self._module.kind != "dit"

    def _core(self) -> Iterator[Kept]:
        """Queries, keys, values, and what the core of attention makes of them."""
        hidden, keys = self._module.hidden_size, self._module.key_value_size
        value, inside = self._value, self._inside
        kernels = self._kernels
        joint = Kept("queries, keys and values", value * inside * (hidden + 2 * keys))
        if self._steps_through_scores() and not kernels.recomputes("core_attn"):
            yield from self._core_in_steps(joint)
            return
        yield joint
        if self._module.is_rotary and kernels.is_unfused:
            # Beside the joint tensor, which holds the values.
            yield Kept("rotated queries and keys", value * inside * (hidden + keys))
        if kernels.recomputes("core_attn"):
            return
        if kernels.keeps_scores:
            scores = self._scores()
            yield Kept("scores", value * scores)
            if kernels.attention_dropout:
                yield Kept("scores after dropout, mask", (value + 1) * scores)
            return
        yield Kept("attention result", value * inside * hidden)
        yield Kept("sums of scores", _FP32_BYTES * inside * self._module.num_attention_heads)

    def _steps_through_scores(self) -> bool:
        """Torch's attention on a CPU, which has no kernel with dropout."""
        kernels = self._kernels
        has_dropout = kernels.attention_dropout and self._module.kind != "dit"
        return kernels.on_cpu and has_dropout

    def _core_in_steps(self, joint: Kept) -> Iterator[Kept]:
        # In 32 bits whatever the type of activations is; heads of keys are repeated first.
        hidden, keys = self._module.hidden_size, self._module.key_value_size
        wide = _FP32_BYTES * self._inside * hidden
        yield Kept("scaled queries and keys", 2 * wide)
        if self._kernels.is_fp32 and keys == hidden:
            yield joint
        else:
            yield Kept("values", wide)
        yield Kept("scores, mask, scores after dropout", 3 * _FP32_BYTES * self._scores())

    def _scores(self) -> float:
        heads = self._module.num_attention_heads
        return (
            heads
            * sum(length * length for length in self._size.spans)
            * (self._inside / max(1, self._size.tokens))
        )

    def _joined_heads(self, name: str) -> Iterator[Kept]:
        """The input of the linear layer behind attention; a fused kernel's result is that."""
        is_copy = self._kernels.is_unfused or self._kernels.keeps_scores
        if self._trained and (is_copy or self._kernels.recomputes("core_attn")):
            yield Kept(name, self._value * self._inside * self._module.hidden_size)

    def _cross_attention(self) -> Iterator[Kept]:
        if self._module.kind != "dit":
            return
        hidden, value = self._module.hidden_size, self._value
        context = self._size.context_tokens / self._tensor
        yield from self._norm("cross norm", self._between)
        yield from self._linear_input("cross input")
        yield Kept("cross queries", value * self._inside * hidden)
        yield Kept("cross keys and values", value * context * 2 * hidden)
        yield Kept("cross result", value * self._inside * hidden)
        heads = self._module.num_attention_heads
        yield Kept("cross sums of scores", _FP32_BYTES * self._inside * heads)
        yield from self._joined_heads("cross output")

    def _feed_forward(self) -> Iterator[Kept]:
        yield from self._layer_norm("MLP norm")
        yield from self._modulation("MLP")
        if self._module.experts is not None:
            yield from self._experts()
        elif self._kernels.recomputes("mlp"):
            yield Kept("MLP input", self._value * self._between * self._module.hidden_size)
        else:
            yield from self._linear_input("MLP input")
            yield from self._mlp("MLP", self._inside * self._module.ffn_hidden_size)
        yield from self._residual("MLP")

    def _mlp(self, name: str, values: float) -> Iterator[Kept]:
        """From the first linear layer's output to the second one's input, ``values`` wide."""
        if self._module.is_gated:
            # In steps: both halves, the activated one, the other one moved, and their product.
            steps = 2 if self._kernels.fuses_activation else 4
        else:
            # CLIP's GELU is a sigmoid and a product; other modules have one kernel for it.
            in_steps = self._module.is_clip and self._kernels.on_cpu
            steps = 2 if in_steps else 1
        yield Kept(f"{name} before and in its activation", self._value * steps * values)
        if self._trained:
            yield Kept(f"{name} after its activation", self._value * values)

    def _experts(self) -> Iterator[Kept]:
        experts, hidden = self._module.experts, self._module.hidden_size
        assert experts is not None
        if self._kernels.recomputes("moe"):
            yield Kept("experts' input", self._value * self._between * hidden)
            return
        # What the router reads, shared with the shared expert.
        yield from self._linear_input("experts' input")
        # Experts gather the rows that sequence parallelism divides, and divide their width.
        own, gathered = self._between * experts.top_k, self._whole * experts.top_k
        if self._trained:
            yield Kept("rows by expert", self._value * gathered * hidden)
        yield Kept("chosen experts, probabilities", own * (_INDEX_BYTES + 2 * _FP32_BYTES))
        yield Kept("order of rows", gathered * _INDEX_BYTES)
        per_expert = self._between * _FP32_BYTES + self._whole
        yield Kept("probabilities and choice by expert", experts.num_experts * per_expert)
        values = self._inside * experts.top_k * experts.ffn_hidden_size
        yield from self._mlp("experts", values)
        if not self._kernels.fuses_activation:
            yield Kept("experts before their probabilities", self._value * values)
        shared = experts.shared_ffn_hidden_size
        if shared is not None and not self._kernels.recomputes("shared_experts"):
            yield from self._mlp("shared expert", self._inside * shared)

    def _adapter(self) -> Iterator[Kept]:
        adapter, between = self._module.adapter, self._between
        assert adapter is not None
        yield Kept("adapter input", self._value * between * self._module.hidden_size)
        narrow = adapter.bottleneck
        yield Kept("adapter", self._value * between * ((1 + NUM_EXPERTS) * narrow + NUM_EXPERTS))
        yield Kept("gates", _FP32_BYTES * between * NUM_EXPERTS)
        wide = self._module.hidden_size * narrow // adapter.num_groups
        yield Kept("weights in the order of groups", self._value * NUM_EXPERTS * wide)

    def _modulation(self, name: str) -> Iterator[Kept]:
        """Shift, scale and gate of a ``dit`` layer: factors, and what they multiply."""
        if self._module.kind != "dit":
            return
        rows = self._value * self._between * self._module.hidden_size
        yield Kept(f"{name} modulation and gate", 4 * rows)

    # ---- what several parts have ------------------------------------------------------------

    @property
    def _repeats_norms(self) -> bool:
        """Transformer Engine's norms are parts of linear layers, which are not repeated."""
        return self._kernels.recomputes("layernorm") and self._kernels.is_unfused

    def _layer_norm(self, name: str) -> Iterator[Kept]:
        if self._repeats_norms:
            yield Kept(f"{name} input", self._value * self._between * self._module.hidden_size)
        else:
            yield from self._norm(name, self._between)

    def _norm(self, name: str, rows: float, is_trained: bool | None = None) -> Iterator[Kept]:
        hidden, kernels = self._module.hidden_size, self._kernels
        is_rms = self._module.kind == "causal"
        if is_rms and kernels.is_unfused:
            # In steps, in 32 bits: the row, its factor, and the row before it is weighted.
            steps = 2 if (self._trained if is_trained is None else is_trained) else 1
            yield Kept(f"{name} in steps", _FP32_BYTES * rows * (steps * hidden + 1))
            return
        yield Kept(f"{name} input", self._value * rows * hidden)
        sum_bytes = self._value if kernels.on_cpu else _FP32_BYTES
        yield Kept(f"{name} sums", sum_bytes * rows * (1 if is_rms else 2))

    def _linear_input(self, name: str) -> Iterator[Kept]:
        """The input of a linear layer, which the gradient of its weight reads."""
        if self._trained and not self._repeats_norms:
            yield Kept(name, self._value * self._between * self._module.hidden_size)

    def _residual(self, name: str) -> Iterator[Kept]:
        if self._has_dropout:
            rows = self._kernels.mask_bytes * self._between
            yield Kept(f"{name} dropout mask", rows * self._module.hidden_size)

    # ---- before the first layer -------------------------------------------------------------

    def first_extra(self) -> tuple[Kept, ...]:
        """What sits before the first layer; of frozen towers only what the layer keeps of it."""
        embeddings = {
            "causal": self._embedding,
            "dit": self._dit_embedding,
            "vit": self._patch_embedding,
        }
        is_trained = not self._parts.isdisjoint(self._module.first_part_parameters())
        embedding = embeddings[self._module.kind]() if is_trained else ()
        return (*embedding, *self._undivided_rows())

    def _undivided_rows(self) -> Iterator[Kept]:
        """Sequence parallelism takes a part of the embedded rows, whose memory stays whole."""
        is_copied = self._module.kind == "causal" and self._kernels.is_unfused
        missing = self._whole - self._between
        if missing and not (is_copied and not self._kernels.is_fp32):
            yield Kept("embedded rows", self._value * missing * self._module.hidden_size)

    def _embedding(self) -> Iterator[Kept]:
        yield Kept("token numbers", _INDEX_BYTES * self._whole)
        if self._has_dropout:
            mask = self._kernels.mask_bytes * self._whole * self._module.hidden_size
            yield Kept("embedding dropout mask", mask)

    def _patch_embedding(self) -> Iterator[Kept]:
        module, rows = self._module, self._value * self._whole
        if module.num_mels is not None:
            # Two convolutions, the second one with stride 2: both inputs, both before GELU.
            yield Kept("frames", rows * 2 * module.num_mels)
            yield Kept("convolutions", rows * 5 * module.hidden_size)
            return
        if module.is_clip:
            # A class row per image; and the norm before the first layer.
            patches = self._whole - len(self._size.spans)
            yield Kept("patches", self._value * patches * (module.patch_values or 0))
            yield from self._norm("first norm", self._whole)
            return
        yield Kept("patches", rows * (module.patch_values or 0))
        sides = 2 * isqrt(self._size.tokens)
        yield Kept("interpolation", _FP32_BYTES * sides * isqrt(module.num_positions))

    def _dit_embedding(self) -> Iterator[Kept]:
        module, value, clips = self._module, self._value, len(self._size.spans)
        hidden = module.hidden_size
        if "embedding" in self._parts:
            yield Kept("patches", value * self._whole * (module.patch_values or 0))
        if "text_projection" in self._parts:
            yield Kept("text", value * self._size.context_tokens * (module.context_size or 0))
        if "time" in self._parts:
            yield Kept("times", value * clips * (TIMESTEP_VALUES + 4 * hidden))

    # ---- after the last layer ---------------------------------------------------------------

    def last_extra(self) -> tuple[Kept, ...]:
        """What sits after the last layer."""
        if self._module.is_clip:
            # Features are rows of the residual stream.
            return ()
        if self._module.kind == "dit":
            return tuple(self._dit_output())
        parts = self._head() if self._module.kind == "causal" else self._projector()
        return (*self._final_norm(self._between), *parts)

    def _final_norm(self, rows: float) -> Iterator[Kept]:
        """Nothing where no gradient goes through it: behind it alone something is trained."""
        if self._is_entered or "norm" in self._parts:
            yield from self._norm("final norm", rows, "norm" in self._parts)

    def _head(self) -> Iterator[Kept]:
        module = self._module
        if not module.has_head:
            return
        if "head" in self._parts:
            yield Kept("head input", self._value * self._between * module.hidden_size)
        # Probabilities in 32 bits, the target, and whether it is on this rank.
        yield Kept("probabilities", _FP32_BYTES * self._inside * (module.vocab_size or 0))
        yield Kept("targets", (_INDEX_BYTES + 1) * self._whole)

    def _projector(self) -> Iterator[Kept]:
        module, value = self._module, self._value
        if module.projector is None:
            return
        is_trained = "projector" in self._parts
        if is_trained:
            yield Kept("projector input", value * self._whole * module.hidden_size)
        inner = value * self._inside / module.projector.merge * module.projector.intermediate_size
        yield Kept("projector before its activation", inner)
        if is_trained:
            yield Kept("projector after its activation", inner)

    def _dit_output(self) -> Iterator[Kept]:
        module, value, rows = self._module, self._value, self._whole
        hidden = module.hidden_size
        if self._is_entered:
            yield from self._norm("final norm", rows)
        # Scale and the normed row; the latter alone where only the scale wants a gradient.
        factors = 2 if self._is_entered else 1
        yield Kept("final modulation", value * rows * factors * hidden)
        if "output" in self._parts:
            yield Kept("output input", value * rows * hidden)
            yield Kept("final modulation input", value * len(self._size.spans) * hidden)
        yield Kept("errors", _FP32_BYTES * rows * (module.patch_values or 0))
