"""Which of Megatron's modules a transformer layer is made of.

``local`` layers need neither Transformer Engine nor Apex: Megatron's own tensor-parallel linear
layers, torch's norms, and ``SpanAttention``.  Both backends give the same checkpoint keys.
"""

import copy
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.attention import SpanAttention, SpanSelfAttention

__all__ = [
    "block_submodules",
    "build_torch_norm",
    "linear_layers",
    "uses_transformer_engine",
]


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Whether layers of ``config`` are built from Transformer Engine's modules."""
    return bool(config.transformer_impl == "transformer_engine")


def linear_layers(config: TransformerConfig) -> tuple[Any, Any]:
    """Linear layers that divide outputs, and inputs, among tensor-parallel ranks."""
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        return TEColumnParallelLinear, TERowParallelLinear
    return ColumnParallelLinear, RowParallelLinear


def build_torch_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.Module:
    """torch's norm of the kind that ``config`` names, also under sequence parallelism.

    Megatron's wrapper of torch's norms refuses sequence parallelism because gradients of norms
    are then partial sums on each rank; marking the parameters makes Megatron add them up.
    """
    plain = copy.copy(config)
    plain.sequence_parallel = False
    # A choice among Apex's kernels, without meaning for torch's.
    plain.persist_layer_norm = False
    norm: torch.nn.Module = WrappedTorchNorm(plain, hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def block_submodules(
    config: TransformerConfig, *, num_layers: int, mask_type: AttnMaskType
) -> TransformerBlockSubmodules:
    """What a ``TransformerBlock`` of ``num_layers`` layers is built from.

    Raises:
        UnsupportedError: Attention that is not plain self-attention.
    """
    if config.multi_latent_attention:
        raise UnsupportedError(
            "multi-latent attention is not supported yet: unset multi_latent_attention"
        )
    experts = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if uses_transformer_engine(config):
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_submodules(
            qk_layernorm=config.qk_layernorm, **experts
        )
        final_norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_submodules(
            normalization=config.normalization, qk_layernorm=config.qk_layernorm, **experts
        )
        layer.input_layernorm = layer.pre_mlp_layernorm = build_torch_norm
        attention = layer.self_attention.submodules
        attention.core_attention = SpanAttention
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention, name) is not IdentityOp:
                setattr(attention, name, build_torch_norm)
        final_norm = build_torch_norm
    layer.self_attention.module = SpanSelfAttention
    layer.self_attention.params = {"attn_mask_type": mask_type}
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=final_norm)
