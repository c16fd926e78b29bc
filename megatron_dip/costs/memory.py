"""Memory of layers: weights, gradients and optimizer state; stored activations; boundaries.

Mixed precision as in Megatron: weights in bf16, gradients accumulated in fp32, and the optimizer's
fp32 copy of the weight with Adam's two moments, which a distributed optimizer divides over the
data-parallel ranks.  Frozen weights have neither gradient nor optimizer state.

Activations are what the backward of a layer reads, with a fused attention kernel, that keeps no
scores, and without dropout: inputs of linear layers and norms, queries, keys, values and output of
attention, both sides of the MLP's activation.  Frozen layers that only pass a gradient on keep
no inputs of linear layers; an adapter keeps the rows that it reads.  Layers made of torch's own
operations (``local`` ones with ``SpanAttention``) keep more: what the steps of a norm, of
rotary positions and of a gated activation hand to one another, and outputs of attention twice,
before and after they are joined.  Not modelled: the allocator's losses, buffers of collectives,
and workspace.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dip.costs.layers import ItemSize, Parallelism
from megatron_dip.costs.shapes import ModuleShape

__all__ = ["MemoryModel", "StoredPart"]

StoredPart = Literal["linear", "first_extra", "last_extra"]
"""One layer, what sits before the first, or what sits after the last."""

_FP32_BYTES = 4
_BF16_BYTES = 2
_ADAM_BYTES = 8
_INDEX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Bytes on one rank."""

    parallel: Parallelism
    is_fp32: bool = False
    """Weights and activations in fp32; bf16 otherwise."""
    is_unfused: bool = False
    """Layers made of torch's own operations, without Transformer Engine."""
    optimizer_shards: int = 1
    """Ranks that share one optimizer state: the data-parallel size with a distributed optimizer."""

    @property
    def bytes_per_value(self) -> int:
        """Of weights and activations."""
        return _FP32_BYTES if self.is_fp32 else _BF16_BYTES

    def bytes_per_weight(self, *, trainable: bool, shards: int | None = None) -> float:
        """Weight, gradient and optimizer state together; ``shards`` ranks share the latter."""
        if not trainable:
            return self.bytes_per_value
        # In fp32 the weight is its own master copy.
        state = _ADAM_BYTES if self.is_fp32 else _ADAM_BYTES + _FP32_BYTES
        return self.bytes_per_value + _FP32_BYTES + state / (shards or self.optimizer_shards)

    def layer_static_bytes(self, module: ModuleShape) -> int:
        """One layer."""
        experts = module.layer_expert_parameters()
        divided = (module.layer_linear_parameters() - experts) / self.parallel.tensor
        own = self._static_bytes(module, divided + module.layer_other_parameters())
        own += self._expert_bytes(module, experts / self.parallel.tensor / self.parallel.expert)
        return own + self._adapter_bytes(module, module.adapter_parameters())

    def first_static_bytes(self, module: ModuleShape) -> int:
        """What sits before the first layer."""
        parameters = module.first_parameters()
        shards = self.parallel.tensor if module.kind == "causal" else 1
        own = self._static_bytes(module, parameters / shards)
        return own + self._adapter_bytes(module, module.neck_parameters())

    def last_static_bytes(self, module: ModuleShape) -> int:
        """What sits after the last layer."""
        shards = 1 if module.kind == "dit" else self.parallel.tensor
        return self._static_bytes(module, module.last_parameters() / shards)

    def _static_bytes(self, module: ModuleShape, num_weights: float) -> int:
        return round(num_weights * self.bytes_per_weight(trainable=module.trains_layers))

    def _expert_bytes(self, module: ModuleShape, num_weights: float) -> int:
        """Weights of experts, of which fewer replicas hold a copy."""
        shards = max(1, self.optimizer_shards // self.parallel.expert)
        per_weight = self.bytes_per_weight(trainable=module.trains_layers, shards=shards)
        return round(num_weights * per_weight)

    def _adapter_bytes(self, module: ModuleShape, num_weights: int) -> int:
        """Adapters and neck, which are whole on every rank."""
        return round(num_weights * self.bytes_per_weight(trainable=module.trainable))

    def stored_bytes(self, module: ModuleShape, size: ItemSize, part: StoredPart) -> int:
        """Kept from forward to backward by one item in a part of a module that has a backward."""
        if part == "linear":
            return self.activation_bytes(module, size)
        values = {"first_extra": self._first_bytes, "last_extra": self._last_bytes}[part]
        return round(values(module, size))

    def _first_bytes(self, module: ModuleShape, size: ItemSize) -> float:
        """What an embedding's weight gradient reads."""
        if not module.trains_layers:
            return 0.0
        rows = size.tokens / self.parallel.context
        if module.kind == "causal":
            return _INDEX_BYTES * rows
        return self.bytes_per_value * rows * (module.patch_values or 0)

    def _last_bytes(self, module: ModuleShape, size: ItemSize) -> float:
        """The final norm, and what reads it: head and loss, or the projector."""
        rows = size.tokens / self.parallel.context
        between_rows = size.tokens / self.parallel.sequence_shards
        norm = self._norm_values(module) + (2 if module.trains_layers else 1) * module.hidden_size
        stored = self.bytes_per_value * norm * between_rows
        if module.kind == "causal" and module.has_head:
            # The loss keeps probabilities in 32 bits, the target, and whether it is on this rank.
            stored += _FP32_BYTES * rows * (module.vocab_size or 0) / self.parallel.tensor
            stored += (_INDEX_BYTES + 1) * rows
        if module.projector is not None:
            inner = module.projector.intermediate_size / self.parallel.tensor
            groups = rows / module.projector.merge
            stored += self.bytes_per_value * groups * inner * (2 if module.trains_layers else 1)
        return stored

    def _norm_values(self, module: ModuleShape) -> int:
        """Kept by a norm per token beside its input and output."""
        if not self.is_unfused:
            return 0
        # RMSNorm in steps keeps its factor and the row before it is weighted, LayerNorm two sums.
        return module.hidden_size + 1 if module.kind == "causal" else 2

    def activation_bytes(self, module: ModuleShape, size: ItemSize) -> int:
        """Kept per layer from forward to backward for one item, without recompute."""
        hidden, ffn, grouped = module.hidden_size, module.ffn_hidden_size, module.key_value_size
        inside_rows = size.tokens / self.parallel.context / self.parallel.tensor
        between_rows = size.tokens / self.parallel.sequence_shards
        context_rows = size.context_tokens / self.parallel.tensor
        # Norm inputs; queries, keys, values and output of attention; the MLP before activation.
        between = 2 * hidden
        if module.experts is not None:
            ffn = module.experts.top_k * module.experts.ffn_hidden_size
            ffn += module.experts.shared_ffn_hidden_size or 0
            # Rows in the order of their experts, before and after; the router's probabilities.
            between += 2 * module.experts.top_k * hidden + module.experts.num_experts
        inside = 2 * hidden + 2 * grouped + (2 if module.is_gated else 1) * ffn
        context = 0
        if module.adapter is not None:
            # What the adapter reads; what it writes goes into linear layers.
            between += hidden
        if module.trains_layers:
            between += 2 * hidden
            inside += ffn
        if module.kind == "dit":
            # The third norm; what the two gates multiply; queries, output, keys and values.
            between += (4 if module.trainable else 3) * hidden
            inside += 2 * hidden
            context = 2 * hidden
        if self.is_unfused:
            between += 2 * self._norm_values(module)
            # Outputs of attention before they are put together, and one sum per head and token.
            inside += hidden + module.num_attention_heads
            if module.kind == "causal":
                # Rotated queries and keys beside the joint tensor that holds the values; two more
                # steps of the gate; and sines and cosines for queries and for keys.
                inside += hidden + grouped + 2 * ffn
                between += 4 * hidden // module.num_attention_heads
        values = between * between_rows + inside * inside_rows + context * context_rows
        return round(self.bytes_per_value * values)

    def boundary_bytes(self, module: ModuleShape, size: ItemSize) -> int:
        """Input or output of a layer for one item.

        Stages of a ``dit`` module hand on its text and its modulation as well, whole on every rank.
        """
        rows = size.tokens / self.parallel.sequence_shards
        if module.kind == "dit":
            rows += size.context_tokens + module.conditioning_rows * len(size.spans)
        return round(self.bytes_per_value * rows * module.hidden_size)
