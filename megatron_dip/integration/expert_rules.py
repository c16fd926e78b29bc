"""Which of Megatron's options for experts work with the models here, and under plans."""

import argparse
from typing import Any

from megatron_dip.config import DipConfig, build_partition
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.errors import ConfigError, UnsupportedError
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


def check_expert_arguments(args: argparse.Namespace, path: str, config: DipConfig) -> None:
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
    balancing = _one_by_one(args, "moe_router_load_balancing_type", "aux_loss")
    wrong = [name for name in balancing if name not in _BALANCING]
    if wrong:
        raise UnsupportedError(
            f"--moe-router-load-balancing-type {wrong[0]} does not work with this model: use "
            f"'aux_loss' or 'none'; others depend on how sequences are packed, on the order of "
            f"microbatches or on other replicas"
        )
    _check_scale(args)
    if getattr(args, "dip_schedule", False):
        for module in config.model_shape().modules:
            if module.experts is not None:
                _check_not_split(args, config, module)
                _check_shared(args, config, module)


def _check_scale(args: argparse.Namespace) -> None:
    """With rows masked, Megatron takes the tokens of all tensor-parallel ranks for those of one,
    and weighs the auxiliary loss by their number: too much by a factor of the ranks."""
    coefficient = sum(_one_by_one(args, "moe_aux_loss_coeff", 0.0))
    size = getattr(args, "tensor_model_parallel_size", 1)
    if coefficient and size > 1 and getattr(args, "calculate_per_token_loss", False):
        raise UnsupportedError(
            f"--moe-aux-loss-coeff {coefficient:g} does not work with --calculate-per-token-loss "
            f"and --tensor-model-parallel-size {size}: leave --calculate-per-token-loss out; "
            f"Megatron would weigh the auxiliary loss {size} times"
        )


def _check_not_split(args: argparse.Namespace, config: DipConfig, module: ModuleShape) -> None:
    """An auxiliary loss is a mean or a product of means over a microbatch, not a sum over it."""
    tokens = build_partition(config).sub_microbatch_tokens.get(module.name)
    coefficient = sum(_one_by_one(args, "moe_aux_loss_coeff", 0.0))
    z_coefficient = getattr(args, "moe_z_loss_coeff", None)
    if tokens is None or not (coefficient or z_coefficient):
        return
    flag = f"--moe-aux-loss-coeff {coefficient:g}"
    if not coefficient:
        flag = f"--moe-z-loss-coeff {z_coefficient:g}"
    raise UnsupportedError(
        f"{flag} does not work with sub_microbatch_tokens {tokens} of module {module.name}: the "
        f"auxiliary loss of a microbatch is not the sum of those of its parts (remove "
        f"sub_microbatch_tokens of {module.name} from the schedule, or set the coefficient to 0)"
    )


def _check_shared(args: argparse.Namespace, config: DipConfig, module: ModuleShape) -> None:
    """Replicas that share experts exchange different numbers of tokens, in every backward too."""
    size = getattr(args, "expert_model_parallel_size", 1)
    if size == 1:
        return
    dispatcher = getattr(args, "moe_token_dispatcher_type", "allgather")
    if dispatcher != "alltoall":
        raise UnsupportedError(
            f"--moe-token-dispatcher-type {dispatcher} does not work with "
            f"--expert-model-parallel-size {size} and --dip-schedule: use 'alltoall'; the replicas "
            f"have different numbers of tokens"
        )
    backward = config.model_shape().modules_with_backward()
    starts_trained = module.trains_first_extra or any(
        0 in layers for layers in module.trained.layers
    )
    if not starts_trained and not backward.isdisjoint(module.upstream):
        raise UnsupportedError(
            f"--expert-model-parallel-size {size} does not work with first layers of the "
            f"{module.name} module that are frozen behind something trained under --dip-schedule: "
            f"use 1, or train its embedding; a replica whose microbatch needs no gradient there "
            f"would not meet the others in its backward"
        )


def _one_by_one(args: argparse.Namespace, name: str, default: Any) -> list[Any]:
    """The values of an option that takes one or several."""
    value = getattr(args, name, default)
    return list(value) if isinstance(value, list | tuple) else [value]
