"""Batch problems from the sizes of items alone: floating-point operations over an assumed rate.

A linear layer of n tokens, i inputs and o outputs takes 2 n i o operations forward, as many for
the gradient of its input and as many for that of its weight.  The core of attention over a span
of s tokens takes 4 s^2 h forward (half of it where causal) and twice that for its gradients, and
has no weights.  Norms, activations and residuals are part of the overhead per layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_dip.config import DipConfig, LanguageConfig, VisionConfig
from megatron_dip.workload import (
    Item,
    LayerExtra,
    MicrobatchMetadata,
    Module,
    Problem,
    TransferCost,
)

__all__ = ["LayerShape", "ProblemBuilder", "language_layer", "vision_layer"]

_GIB = 1024**3
_OUTPUT_ROWS_PER_TOKEN = 0.25
"""Language tokens per patch, after the 2x2 merge."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What the cost of a transformer layer depends on."""

    hidden_size: int
    linear_weights: int
    """Weights of all linear layers: operations per token are twice as many."""
    activation_width: int
    """Values per token that a layer stores for its backward."""
    is_causal: bool

    def linear_flops(self, num_tokens: int) -> float:
        return 2.0 * num_tokens * self.linear_weights

    def attention_flops(self, span_lengths: Iterable[int]) -> float:
        full = sum(4.0 * length * length * self.hidden_size for length in span_lengths)
        return full / 2 if self.is_causal else full


def vision_layer(config: VisionConfig) -> LayerShape:
    """Queries, keys, values and output of equal width, and an MLP without gate."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    return LayerShape(
        hidden_size=hidden,
        linear_weights=4 * hidden * hidden + 2 * hidden * ffn,
        activation_width=8 * hidden + 2 * ffn,
        is_causal=False,
    )


def language_layer(config: LanguageConfig) -> LayerShape:
    """Grouped queries and a gated MLP."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    grouped = hidden // config.num_attention_heads * config.num_query_groups
    return LayerShape(
        hidden_size=hidden,
        linear_weights=2 * hidden * hidden + 2 * hidden * grouped + 3 * hidden * ffn,
        activation_width=6 * hidden + 2 * grouped + 3 * ffn,
        is_causal=True,
    )


@dataclass(frozen=True, kw_only=True)
class ProblemBuilder:
    """Makes the problem of a batch from the metadata of its microbatches.

    Args:
        config: Model, schedule and assumed rates.
        bytes_per_value: Of activations: 4 in fp32, 2 in bf16.
        static_bytes_per_weight: Weight, gradient and optimizer state together.
        num_tensor_ranks: Tensor-parallel size, over which work and weights are divided.
    """

    config: DipConfig
    bytes_per_value: int
    static_bytes_per_weight: int
    num_tensor_ranks: int = 1

    def build(self, microbatches: Sequence[MicrobatchMetadata]) -> Problem:
        """The problem of one batch."""
        schedule = self.config.schedule
        limit = int(schedule.memory_limit_gib * _GIB)
        return Problem(
            num_ranks=schedule.num_ranks,
            memory_limit_bytes=(limit,) * schedule.num_ranks,
            transfer=TransferCost(
                latency_us=schedule.costs.transfer_latency_us,
                bytes_per_us=schedule.costs.transfer_bytes_per_us,
            ),
            modules=self._modules(),
            microbatches=tuple(
                {
                    name: items
                    for name, items in (
                        ("vision", self._vision_items(metadata)),
                        ("language", self._language_items(metadata)),
                    )
                    if items
                }
                for metadata in microbatches
            ),
        )

    def _modules(self) -> tuple[Module, ...]:
        vision, language = self.config.model.vision, self.config.model.language
        patch_values = 3 * vision.patch_size**2
        merged = 4 * vision.hidden_size
        projector = merged * merged + merged * language.hidden_size
        vocabulary = language.vocab_size * language.hidden_size
        return (
            self._module(
                "vision",
                vision,
                vision_layer(vision),
                (),
                patch_values * vision.hidden_size + vision.position_grid**2 * vision.hidden_size,
                projector,
            ),
            self._module(
                "language", language, language_layer(language), ("vision",), vocabulary, vocabulary
            ),
        )

    def _module(
        self,
        name: str,
        config: VisionConfig | LanguageConfig,
        layer: LayerShape,
        upstream: tuple[str, ...],
        first_weights: int,
        last_weights: int,
    ) -> Module:
        return Module(
            name=name,
            num_layers=config.num_layers,
            upstream=upstream,
            trainable=config.trainable,
            layer_overhead_us=self.config.schedule.costs.layer_overhead_us,
            layer_static_bytes=self._static_bytes(layer.linear_weights),
            first_layer_extra=LayerExtra(static_bytes=self._static_bytes(first_weights)),
            last_layer_extra=LayerExtra(static_bytes=self._static_bytes(last_weights)),
        )

    def _static_bytes(self, num_weights: int) -> int:
        return num_weights * self.static_bytes_per_weight // self.num_tensor_ranks

    def _vision_items(self, metadata: MicrobatchMetadata) -> tuple[Item, ...]:
        config = self.config.model.vision
        layer = vision_layer(config)
        merged = 4 * config.hidden_size
        projector = merged * merged + merged * self.config.model.language.hidden_size
        return tuple(
            self._item(
                "vision",
                number,
                layer,
                tokens,
                spans,
                trainable=config.trainable,
                first_flops=2.0 * tokens * 3 * config.patch_size**2 * config.hidden_size,
                last_flops=2.0 * tokens * _OUTPUT_ROWS_PER_TOKEN * projector,
            )
            for number, (tokens, spans) in enumerate(metadata.sizes("vision"))
        )

    def _language_items(self, metadata: MicrobatchMetadata) -> tuple[Item, ...]:
        config = self.config.model.language
        layer = language_layer(config)
        return tuple(
            self._item(
                "language",
                number,
                layer,
                tokens,
                spans,
                trainable=config.trainable,
                last_flops=2.0 * tokens * config.hidden_size * config.vocab_size,
                needs=metadata.needs[number],
            )
            for number, (tokens, spans) in enumerate(metadata.sizes("language"))
        )

    def _item(
        self,
        module: str,
        number: int,
        layer: LayerShape,
        tokens: int,
        spans: Sequence[int],
        *,
        trainable: bool,
        first_flops: float = 0.0,
        last_flops: float = 0.0,
        needs: tuple[int, ...] | None = None,
    ) -> Item:
        linear = self._time_us(module, layer.linear_flops(tokens))
        attention = self._time_us(module, layer.attention_flops(spans))
        first, last = self._time_us(module, first_flops), self._time_us(module, last_flops)
        width = self.bytes_per_value * tokens
        return Item(
            item=number,
            tokens=tokens,
            forward_us=linear + attention,
            input_grad_us=linear + 2 * attention,
            weight_grad_us=linear if trainable else 0.0,
            activation_bytes=width * layer.activation_width // self.num_tensor_ranks,
            boundary_bytes=width * layer.hidden_size,
            first_extra_forward_us=first,
            # Nothing before the first layer of a tower takes the gradient of its input.
            first_extra_weight_grad_us=first if trainable else 0.0,
            last_extra_forward_us=last,
            last_extra_input_grad_us=last,
            last_extra_weight_grad_us=last if trainable else 0.0,
            needs=None if needs is None else {"vision": needs},
        )

    def _time_us(self, module: str, flops: float) -> float:
        schedule = self.config.schedule
        rate = schedule.modules[module].flops_per_us or schedule.costs.flops_per_us
        return flops / self.num_tensor_ranks / rate
