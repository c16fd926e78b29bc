"""What of a layer's forward Megatron's recomputation repeats in its backward, by its flags.

Beside it plans recompute layers of their own choice, whose time a problem states apart.
"""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_dip.costs.kernels import Kernels, RecomputedPart

__all__ = ["repeated_share"]

_EXPERTS = ("router", "dispatch", "experts_in", "experts_activation", "experts_out", "combine")
_SHARED = ("shared_in", "shared_activation", "shared_out")
_OPERATIONS: Mapping[RecomputedPart, tuple[str, ...]] = MappingProxyType(
    {
        "core_attn": ("attention",),
        "layernorm": ("attention_norm", "mlp_norm"),
        "mlp": ("mlp_in", "mlp_activation", "mlp_out"),
        "moe": (*_EXPERTS, *_SHARED),
        "shared_experts": _SHARED,
    }
)


def repeated_share(kernels: Kernels, operation: str, num_layers: float) -> float:
    """How much of an operation's forward time its backward has once more, from 0 to 1.

    Args:
        operation: Its name, as in ``layers``.
        num_layers: Of a stage of its module.
    """
    if kernels.recompute == "full":
        if kernels.recompute_method == "block":
            return min(1.0, kernels.recompute_num_layers / num_layers)
        return 1.0
    repeated = any(
        operation in names and kernels.recomputes(part) and _is_repeated(part, kernels)
        for part, names in _OPERATIONS.items()
    )
    return 1.0 if repeated else 0.0


def _is_repeated(part: RecomputedPart, kernels: Kernels) -> bool:
    # Norms are parts of Transformer Engine's linear layers, which are not repeated.
    return part != "layernorm" or kernels.is_unfused
