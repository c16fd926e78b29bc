"""What Megatron's configuration of a run says of its kernels, in the cost model's words."""

from typing import Any, get_args

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.costs import Kernels
from megatron_dip.costs.kernels import RecomputedPart

__all__ = ["kernels_of"]


def kernels_of(base: TransformerConfig, *, on_cpu: bool) -> Kernels:
    """The kernels of a run's layers.

    Args:
        base: Megatron's configuration of the run, not that of one module.
        on_cpu: Whether stages compute on a CPU.
    """
    backend: Any = getattr(base, "attention_backend", None)
    parts = set(base.recompute_modules or ()) & set(get_args(RecomputedPart))
    is_unfused = base.transformer_impl == "local"
    return Kernels(
        is_fp32=base.params_dtype == torch.float32,
        is_unfused=is_unfused,
        on_cpu=on_cpu,
        hidden_dropout=base.hidden_dropout > 0.0,
        attention_dropout=base.attention_dropout > 0.0,
        fuses_activation=base.bias_activation_fusion,
        fuses_rotary=base.apply_rope_fusion,
        keeps_scores=not is_unfused and getattr(backend, "name", None) == "unfused",
        recompute=base.recompute_granularity,
        recomputed_parts=frozenset(parts) if base.recompute_granularity else frozenset(),
        recompute_method=base.recompute_method,
        recompute_num_layers=base.recompute_num_layers or 1,
    )
