"""Memory of layers: weights, gradients and optimizer state; stored activations.

Mixed precision as in Megatron: weights in bf16, gradients accumulated in fp32, and the optimizer's
fp32 copy of the weight with Adam's two moments, which a distributed optimizer divides over the
data-parallel ranks.  Frozen weights have neither gradient nor optimizer state.

Activations are what the backward of a layer reads, see ``megatron_dip.costs.kept``.  Not modelled:
the allocator's losses, buffers of collectives, workspace, and what a recomputed layer holds while
its backward runs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_dip.costs.generic_kept import GenericKept
from megatron_dip.costs.kept import Kept, KeptTensors
from megatron_dip.costs.kernels import Kernels
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.costs.sizes import ItemSize
from megatron_dip.costs.weights import PartWeights

__all__ = ["MemoryModel", "StoredPart"]

StoredPart = Literal["linear", "first_extra", "last_extra"]
"""One layer, what sits before the first, or what sits after the last."""

_FP32_BYTES = 4
_ADAM_BYTES = 8


def _total(kept: Iterable[Kept]) -> float:
    return sum(tensor.num_bytes for tensor in kept)


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Bytes on one rank."""

    parallel: Parallelism
    kernels: Kernels = field(default_factory=Kernels)
    """How layers compute; precision is theirs."""
    layers_per_stage: Mapping[str, float] = field(default_factory=dict)
    """Per module, the mean over its stages that have any; where not given they are many."""
    optimizer_shards: int = 1
    """Ranks that share one optimizer state: the data-parallel size with a distributed optimizer."""
    holds_optimizer: bool = True
    """Whether its state lies on the rank, and not elsewhere."""
    activation_bytes_per_value: float | None = None
    """Where given, every layer keeps so many bytes per token and hidden value, divided over the
    ranks of its group, and what sits before and after the layers keeps nothing."""

    def bytes_per_weight(self, *, trainable: bool, shards: int | None = None) -> float:
        """Weight, gradient and optimizer state together; ``shards`` ranks share the latter."""
        if not trainable:
            return self.kernels.bytes_per_value
        if not self.holds_optimizer:
            return self.kernels.bytes_per_value + _FP32_BYTES
        # In fp32 the weight is its own master copy.
        state = _ADAM_BYTES if self.kernels.is_fp32 else _ADAM_BYTES + _FP32_BYTES
        return (
            self.kernels.bytes_per_value + _FP32_BYTES + state / (shards or self.optimizer_shards)
        )

    def layer_static_bytes(self, module: ModuleShape, *, is_trained: bool | None = None) -> int:
        """One layer; where not said, one that is trained if any layer of the module is."""
        own_trained = module.trains_layers if is_trained is None else is_trained
        if module.weights is not None:
            layers = module.weights.layers_like(trained=own_trained)
            return round(sum(map(self._held_bytes, layers)) / len(layers))
        experts = module.layer_expert_parameters()
        divided = (module.layer_linear_parameters() - experts) / self.parallel.tensor
        own = self._bytes((divided + module.layer_other_parameters(), own_trained))
        shards = max(1, self.optimizer_shards // self.parallel.expert)
        # Of experts fewer replicas hold a copy.
        per_weight = self.bytes_per_weight(trainable=own_trained, shards=shards)
        own += round(experts / self.parallel.tensor / self.parallel.expert * per_weight)
        return own + self._adapter_bytes(module, module.adapter_parameters())

    def first_static_bytes(self, module: ModuleShape) -> int:
        """What sits before the first layer."""
        if module.weights is not None:
            return round(self._held_bytes(module.weights.before))
        shards = self.parallel.tensor if module.kind == "causal" else 1
        own = self._part_bytes(module, module.first_part_parameters(), shards)
        return own + self._adapter_bytes(module, module.neck_parameters())

    def last_static_bytes(self, module: ModuleShape) -> int:
        """What sits after the last layer."""
        if module.weights is not None:
            return round(self._held_bytes(module.weights.after))
        shards = 1 if module.kind == "dit" else self.parallel.tensor
        return self._part_bytes(module, module.last_part_parameters(), shards)

    def _part_bytes(self, module: ModuleShape, weights: Mapping[str, int], shards: int) -> int:
        trained = module.trained.parts
        return self._bytes(*((num / shards, part in trained) for part, num in weights.items()))

    def _held_bytes(self, held: PartWeights) -> float:
        """As a rank holds them, so that nothing is divided but the optimizer's state."""
        shards = max(1, self.optimizer_shards // self.parallel.expert)
        return (
            held.trained * self.bytes_per_weight(trainable=True)
            + held.trained_experts * self.bytes_per_weight(trainable=True, shards=shards)
            + (held.frozen + held.frozen_experts) * self.bytes_per_weight(trainable=False)
        )

    def _bytes(self, *weights: tuple[float, bool]) -> int:
        """Numbers of weights, and whether they are trained."""
        return round(
            sum(num * self.bytes_per_weight(trainable=is_trained) for num, is_trained in weights)
        )

    def _adapter_bytes(self, module: ModuleShape, num_weights: int) -> int:
        """Adapters and neck, which are whole on every rank."""
        return round(num_weights * self.bytes_per_weight(trainable=module.trains_adapters))

    def stored_bytes(
        self, module: ModuleShape, size: ItemSize, part: StoredPart, *, is_entered: bool = True
    ) -> int:
        """Kept from forward to backward by one item in a part of a module that has a backward.

        Args:
            is_entered: Whether gradients go on from what sits after the last layer to the layers.
        """
        if part == "linear":
            return self.activation_bytes(module, size)
        if self.activation_bytes_per_value is not None:
            return 0
        kept = self._kept(module, size, is_entered=is_entered)
        return round(_total(kept.first_extra() if part == "first_extra" else kept.last_extra()))

    def activation_bytes(self, module: ModuleShape, size: ItemSize) -> int:
        """Kept per layer from forward to backward for one item, without a plan's recompute."""
        if self.activation_bytes_per_value is not None:
            parallel = self.parallel.of(module)
            values = size.tokens * module.hidden_size / parallel.tensor / parallel.context
            return round(self.activation_bytes_per_value * values)
        kept = self._kept(module, size)
        stored = _total(kept.layer())
        # Spread over the layers, of which a problem knows the number in no stage.
        once = _total(kept.stage()) / self.layers_per_stage.get(module.name, math.inf)
        if self.kernels.recompute != "full":
            return round(stored + once)
        share = self._stored_share(module)
        inputs = _total(kept.recomputed_layer()) * self._kept_inputs(module)
        return round(stored * share + inputs + once)

    def _kept(self, module: ModuleShape, size: ItemSize, *, is_entered: bool = True) -> KeptTensors:
        kind = GenericKept if module.kind == "generic" else KeptTensors
        return kind(module, size, self.parallel, self.kernels, is_entered=is_entered)

    def _stored_share(self, module: ModuleShape) -> float:
        """The part of a stage's layers that Megatron's full recomputation leaves alone."""
        if self.kernels.recompute_method != "block":
            return 0.0
        layers = self.layers_per_stage.get(module.name, math.inf)
        return max(0.0, 1.0 - self.kernels.recompute_num_layers / layers)

    def _kept_inputs(self, module: ModuleShape) -> float:
        """Inputs that Megatron's full recomputation keeps, per layer."""
        if self.kernels.recompute_method == "block":
            return 1.0 - self._stored_share(module)
        layers = self.layers_per_stage.get(module.name)
        if layers is None:
            return 1.0 / self.kernels.recompute_num_layers
        return math.ceil(layers / self.kernels.recompute_num_layers) / layers
