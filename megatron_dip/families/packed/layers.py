"""Which of Megatron's modules a transformer layer is made of.

``local`` layers need neither Transformer Engine nor Apex: Megatron's own tensor-parallel linear
layers, torch's norms, and ``SpanAttention``.  Both backends give the same checkpoint keys.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.attention import SpanAttention

__all__ = [
    "RecomputableLayer",
    "block_submodules",
    "build_torch_norm",
    "linear_layers",
    "set_recomputed_layers",
    "uses_transformer_engine",
]


class RecomputableLayer(TransformerLayer):
    """Megatron's transformer layer; keeps only its input for backward where ``recompute`` is set.

    Megatron chooses recomputed layers once, by their count; a plan chooses them anew for every
    sub-microbatch.  The flag is read in forward only, so passes with different choices may be in
    flight at the same time.
    """

    recompute: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``TransformerLayer.forward``."""
        hidden_states = kwargs.get("hidden_states")
        if not self.recompute or hidden_states is None or not self._needs_backward(hidden_states):
            return self.run_once(*args, **kwargs)
        if not hidden_states.requires_grad:
            # Re-entrant checkpointing only builds a graph from inputs that need gradients, also
            # where it is the parameters inside that are trained.
            hidden_states = hidden_states.detach().requires_grad_()
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        def run(hidden_states: Tensor) -> Tensor:
            return self.run_once(*args, hidden_states=hidden_states, **others)[0]

        return self._checkpointed(run, hidden_states), None

    def run_once(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """One pass through the layer: what forward does, and again where it is recomputed."""
        output: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
        return output

    def _checkpointed(self, run: Any, hidden_states: Tensor) -> Tensor:
        if self.config.fp8 or self.config.fp4:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            output: Tensor = te_checkpoint(
                run, False, get_cuda_rng_tracker, self.pg_collection.tp, hidden_states
            )
        else:
            output = checkpoint(run, False, hidden_states)
        return output

    def _needs_backward(self, hidden_states: Tensor) -> bool:
        trained = any(parameter.requires_grad for parameter in self.parameters())
        return torch.is_grad_enabled() and (hidden_states.requires_grad or trained)


def set_recomputed_layers(block: TransformerBlock, layers: Sequence[int] | None) -> None:
    """Choose the layers, by global number from 0, whose next forward keeps only its input.

    Raises:
        ValueError: A layer that this block does not hold.
    """
    wanted = set(layers or ())
    held = {layer.layer_number - 1 for layer in block.layers}
    if not wanted <= held:
        raise ValueError(
            f"layers {sorted(wanted - held)} to be recomputed are not in this stage, "
            f"which holds layers {sorted(held)}"
        )
    for layer in block.layers:
        layer.recompute = layer.layer_number - 1 in wanted


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
    layer.self_attention.params = {"attn_mask_type": mask_type}
    spec = ModuleSpec(module=RecomputableLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=final_norm)
