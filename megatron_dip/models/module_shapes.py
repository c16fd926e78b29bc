"""The shape of a module from Megatron's configuration of it: what costs are stated from."""

from typing import Any

from megatron_dip.costs.shapes import GenericLayers, ModuleShape

__all__ = ["module_shape"]


def module_shape(
    name: str,
    config: Any,
    *,
    upstream: tuple[str, ...] = (),
    causal: bool = False,
    vocab_size: int | None = None,
    has_head: bool = True,
    output_width: int | None = None,
) -> ModuleShape:
    """The shape of a module with layers of ``config``.

    How many weights there are, and which of them are trained, is read off the built stages later.

    Args:
        name: What schedules and cuts call it.
        config: A ``TransformerConfig`` or one derived from it.
        upstream: Modules that it reads.
        causal: Whether a token attends to those before it alone.
        vocab_size: Of a module that embeds tokens.
        has_head: Whether such a module ends in a head over its vocabulary.
        output_width: Of what other modules read, where a projection changes the width.
    """
    heads: int = config.num_attention_heads
    queries, keys_and_values = _attention_widths(config)
    num_experts, top_k = config.num_moe_experts, config.moe_router_topk
    return ModuleShape(
        name=name,
        kind="generic",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=_mlp_width(config),
        num_attention_heads=heads,
        upstream=upstream,
        vocab_size=vocab_size,
        has_head=has_head,
        generic=GenericLayers(
            attention_size=queries,
            key_value_size=keys_and_values,
            is_causal=causal,
            is_gated=bool(config.gated_linear_unit),
            has_experts=bool(num_experts),
            expert_share=min(1.0, top_k / num_experts) if num_experts else 1.0,
            output_size=output_width,
        ),
    )


def _attention_widths(config: Any) -> tuple[int, int]:
    """Channels of all queries, and of keys and values together."""
    heads: int = config.num_attention_heads
    if getattr(config, "multi_latent_attention", False):
        # Latents are widened to keys and values of every head before the core of attention.
        of_queries = config.qk_head_dim + config.qk_pos_emb_head_dim
        return heads * of_queries, heads * (of_queries + config.v_head_dim)
    channels: int = config.kv_channels or config.hidden_size // heads
    return heads * channels, 2 * channels * (config.num_query_groups or heads)


def _mlp_width(config: Any) -> int:
    """Channels inside the MLP of a layer, of all experts that a token is sent to; the mean over
    layers with and without experts."""
    dense: int = config.ffn_hidden_size or 4 * config.hidden_size
    if not config.num_moe_experts:
        return dense
    routed = config.moe_router_topk * (config.moe_ffn_hidden_size or dense)
    routed += config.moe_shared_expert_intermediate_size or 0
    share = _expert_layers(config) / config.num_layers
    return max(1, round(share * routed + (1 - share) * dense))


def _expert_layers(config: Any) -> int:
    """Layers that have experts; a frequency N puts them into every N-th layer from the first."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return -(-config.num_layers // frequency)
    return sum(1 for has_experts in frequency if has_experts)
