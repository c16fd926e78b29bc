"""Megatron configs of the modules, from plain numbers and one config that carries the run.

The run's config (the one that Megatron builds from its arguments) decides on precision,
parallelism, kernels, dropout and the scale of initial weights; the shapes are each module's own.
"""

from typing import Any, Unpack

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.costs.shapes import ExpertsShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.families.forms import TransformerSizes

__all__ = [
    "make_dit_config",
    "make_language_config",
    "make_projection_config",
    "make_vision_config",
]

# What the modules take over from the run's config.  Named one by one, because everything else in
# it describes the shape of one model (experts, latent attention, windows, extra heads, layouts)
# and would silently change all modules.
_OF_THE_RUN = (
    # precision
    "params_dtype", "pipeline_dtype", "fp16", "bf16", "fp32_residual_connection",
    "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "autocast_dtype",
    "enable_autocast", "fp8", "fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len",
    "fp8_amax_compute_algo", "fp8_wgrad", "fp8_dot_product_attention",
    "fp8_multi_head_attention", "tp_only_amax_red",
    # parallelism
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
    "context_parallel_size", "cp_comm_type", "deallocate_pipeline_outputs", "batch_p2p_comm",
    "overlap_p2p_comm", "tp_comm_overlap",
    # kernels
    "transformer_impl", "attention_backend", "gradient_accumulation_fusion",
    "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
    "persist_layer_norm", "memory_efficient_layer_norm", "deterministic_mode",
    "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "barrier_with_L1_time",
    # recompute
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "distribute_saved_activations",
    # regularisation and initial weights
    "hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_method_std",
    "embedding_init_method_std", "use_cpu_initialization",
    "init_model_with_meta_device", "calculate_per_token_loss",
)  # fmt: skip

# What the run says of experts; how many there are, and how large, is the module's own.
_EXPERTS_OF_THE_RUN = (
    "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_token_dispatcher_type",
    "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_num_groups", "moe_router_group_topk", "moe_router_dtype",
    "moe_router_fusion",
    "moe_permute_fusion", "moe_apply_probs_on_input", "moe_shared_expert_gate",
    "moe_per_layer_logging",
)  # fmt: skip

# How Megatron's own schedule places the layers of the language module, as its command line says.
_PLACEMENT = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


def _of_the_run(base: TransformerConfig, names: tuple[str, ...] = _OF_THE_RUN) -> dict[str, Any]:
    stated = {name: getattr(base, name) for name in names if hasattr(base, name)}
    # Weights are drawn once the stage stands (``initialization``): what Megatron's layers would
    # draw before that is lost, and with --use-cpu-initialization every rank would draw all of it.
    return stated | {"perform_initialization": False}


def _own_norms(norm_epsilon: float | None) -> dict[str, Any]:
    return {} if norm_epsilon is None else {"layernorm_epsilon": norm_epsilon}


def _of_experts(base: TransformerConfig, experts: ExpertsShape) -> dict[str, Any]:
    return _of_the_run(base, _EXPERTS_OF_THE_RUN) | {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
    }


def make_language_config(
    base: TransformerConfig,
    *,
    num_query_groups: int | None = None,
    kv_channels: int | None = None,
    qkv_bias: bool = False,
    experts: ExpertsShape | None = None,
    norm_epsilon: float | None = None,
    **sizes: Unpack[TransformerSizes],
) -> TransformerConfig:
    """A backbone like those of Llama and Qwen: RMSNorm, SwiGLU, rotary positions, no biases.

    ``kv_channels`` are channels per head, by default ``hidden_size / num_attention_heads``.
    ``qkv_bias``: biases of queries, keys and values alone, as Qwen2.5 has them.
    ``experts``: what every layer has in place of its MLP.  ``norm_epsilon``: the run's where None.
    """
    return TransformerConfig(
        **_of_the_run(base)
        | {
            **sizes,
            **_own_norms(norm_epsilon),
            "num_query_groups": num_query_groups,
            "kv_channels": kv_channels,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": qkv_bias,
            "apply_rope_fusion": base.apply_rope_fusion,
            **(_of_experts(base, experts) if experts is not None else {}),
            **{name: getattr(base, name) for name in _PLACEMENT},
        }
    )


def make_vision_config(
    base: TransformerConfig,
    *,
    norm_epsilon: float | None = None,
    has_rotary: bool = False,
    **sizes: Unpack[TransformerSizes],
) -> TransformerConfig:
    """A vision transformer: LayerNorm, GELU, biases; ``norm_epsilon``: the run's where None.

    ``has_rotary``: queries and keys are rotated, by the run's kernels.

    Context-parallel ranks have all of its rows, also where it encodes sounds: what is encoded is
    whole on each, as in Megatron's LLaVA.
    """
    return TransformerConfig(
        **_of_the_run(base)
        | {
            "context_parallel_size": 1,
            **sizes,
            **_own_norms(norm_epsilon),
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
            "add_bias_linear": True,
            "apply_rope_fusion": has_rotary and base.apply_rope_fusion,
        }
    )


def make_projection_config(
    base: TransformerConfig, *, hidden_size: int, ffn_hidden_size: int
) -> TransformerConfig:
    """The projector between the modules; ``hidden_size`` is that of the language module.

    Its rows are never split among tensor-parallel ranks: image features must reach the language
    module whole, whatever part of its rows they go to.
    """
    return TransformerConfig(
        **_of_the_run(base)
        | {
            "num_layers": 1,
            "hidden_size": hidden_size,
            "ffn_hidden_size": ffn_hidden_size,
            # Required by the class; the projector has no attention.
            "num_attention_heads": base.tensor_model_parallel_size,
            "context_parallel_size": 1,
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
            "add_bias_linear": True,
            "sequence_parallel": False,
            "tp_comm_overlap": False,
            "recompute_granularity": None,
            "recompute_method": None,
            "recompute_num_layers": None,
        }
    )


def make_dit_config(
    base: TransformerConfig,
    *,
    norm_epsilon: float | None = None,
    **sizes: Unpack[TransformerSizes],
) -> TransformerConfig:
    """A diffusion transformer: GELU, biases, no dropout; ``norm_epsilon``: the run's where None.

    Raises:
        UnsupportedError: Megatron is to recompute layers: its checkpointing passes tensors alone to
            a layer.  A plan's choice of recomputed layers is another matter.
    """
    if base.recompute_granularity is not None:
        raise UnsupportedError(
            f"--recompute-granularity {base.recompute_granularity} does not work with a diffusion "
            f"transformer: leave the flag out"
        )
    return TransformerConfig(
        **_of_the_run(base)
        | {
            **sizes,
            **_own_norms(norm_epsilon),
            "normalization": "LayerNorm",
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
            "add_bias_linear": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **{name: getattr(base, name) for name in _PLACEMENT},
        }
    )
