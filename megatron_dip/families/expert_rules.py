"""Which of Megatron's options for experts work with the models here."""

import argparse

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.expert_rules import one_by_one
from megatron_dip.integration.rules import LEAVE_OUT, Rule, check_rules

__all__ = ["check_expert_arguments"]

_MODEL_RULES = (
    Rule(
        flag="--moe-token-dispatcher-type",
        destination="moe_token_dispatcher_type",
        allowed=("allgather", "alltoall"),
        remedy="use 'alltoall'",
    ),
)
_BALANCING = ("aux_loss", "none")


def check_expert_arguments(args: argparse.Namespace, path: str, config: FamilyConfig) -> None:
    """Refuse options for experts that do not work with the model of ``config``, read from ``path``.

    Raises:
        ConfigError: The command line asks for experts, the configuration does not.
        UnsupportedError: Names the flag, its value and the remedy.
    """
    if getattr(args, "num_experts", None) is None:
        return
    if "num_experts" not in config.megatron_arguments():
        raise ConfigError(
            f"--num-experts {args.num_experts} but the model of {path} has none: state them there "
            f"(model.language.experts, of families vlm and omni), or {LEAVE_OUT}"
        )
    check_rules(args, _MODEL_RULES, "with this model")
    balancing = one_by_one(args, "moe_router_load_balancing_type", "aux_loss")
    wrong = [name for name in balancing if name not in _BALANCING]
    if wrong:
        raise UnsupportedError(
            f"--moe-router-load-balancing-type {wrong[0]} does not work with this model: use "
            f"'aux_loss' or 'none'; others depend on how sequences are packed, on the order of "
            f"microbatches or on other replicas"
        )
    _check_scale(args)


def _check_scale(args: argparse.Namespace) -> None:
    """With rows masked, Megatron takes the tokens of all tensor-parallel ranks for those of one,
    and weighs the auxiliary loss by their number: too much by a factor of the ranks."""
    coefficient = sum(one_by_one(args, "moe_aux_loss_coeff", 0.0))
    size = getattr(args, "tensor_model_parallel_size", 1)
    if coefficient and size > 1 and getattr(args, "calculate_per_token_loss", False):
        raise UnsupportedError(
            f"--moe-aux-loss-coeff {coefficient:g} does not work with --calculate-per-token-loss "
            f"and --tensor-model-parallel-size {size}: leave --calculate-per-token-loss out; "
            f"Megatron would weigh the auxiliary loss {size} times"
        )
