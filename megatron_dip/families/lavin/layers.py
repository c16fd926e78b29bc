"""Layers with adapters: Megatron's transformer layer, its first norm followed by an adapter.

The adapter hangs on the norm as a forward hook: Megatron feeds the norm's output to attention while
the residual stays as it was, which is where the adapter belongs, and the norm keeps its name in
checkpoints.  Transformer Engine's layers usually fuse this norm into the projection behind it; here
both stand alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dip.families.lavin.adapter import AdapterOptions, RoutedAdapter, Routing
from megatron_dip.families.packed.attention import SpanParams, span_params
from megatron_dip.families.packed.layers import (
    block_submodules,
    build_torch_norm,
    uses_transformer_engine,
)

__all__ = ["AdaptedLayer", "RoutedSpanParams", "adapted_block_submodules", "routed_span_params"]


@dataclass
class RoutedSpanParams(SpanParams):
    """Packed rows, and whose gates weigh them: the only thing that every layer is handed."""

    routing: Routing = field(default_factory=Routing)


def routed_span_params(
    span_lengths: Sequence[int],
    *,
    num_rows: int,
    device: torch.device,
    routing: Routing,
    has_places: bool = False,
) -> RoutedSpanParams:
    """As ``span_params``, with a routing of the same rows."""
    spans = span_params(span_lengths, num_rows=num_rows, device=device, has_places=has_places)
    return RoutedSpanParams(**vars(spans), routing=routing)


class AdaptedLayer(TransformerLayer):
    """A layer whose input norm carries an adapter."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``TransformerLayer.forward``."""
        spans = kwargs.get("packed_seq_params")
        assert isinstance(spans, RoutedSpanParams), "the stage hands over routed spans"
        adapter = self.input_layernorm.adapter
        adapter.routing = spans.routing
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
            return output
        finally:
            adapter.routing = None


def adapted_block_submodules(
    config: TransformerConfig,
    *,
    num_layers: int,
    mask_type: AttnMaskType,
    options: AdapterOptions,
) -> TransformerBlockSubmodules:
    """As ``block_submodules``, with an adapter in every layer."""
    submodules = block_submodules(config, num_layers=num_layers, mask_type=mask_type)
    if not submodules.layer_specs:
        return submodules
    # One specification stands for all layers.
    layer = submodules.layer_specs[0].submodules
    build_norm: Callable[..., torch.nn.Module] = build_torch_norm
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        build_norm = TENorm
        layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.input_layernorm = partial(_build_adapted_norm, build_norm, options)
    spec = ModuleSpec(module=AdaptedLayer, submodules=layer)
    submodules.layer_specs = [spec] * num_layers
    return submodules


def _build_adapted_norm(
    build_norm: Callable[..., torch.nn.Module],
    options: AdapterOptions,
    config: TransformerConfig,
    hidden_size: int,
    eps: float,
    **more: Any,
) -> torch.nn.Module:
    norm = build_norm(config=config, hidden_size=hidden_size, eps=eps, **more)
    norm.adapter = RoutedAdapter(
        hidden_size,
        options,
        dtype=config.params_dtype,
        sequence_parallel=config.sequence_parallel,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
    )
    norm.register_forward_hook(_adapt)
    return norm


def _adapt(norm: torch.nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    adapted: Tensor = norm.adapter(output)  # type: ignore[operator]
    return adapted
