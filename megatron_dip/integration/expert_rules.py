"""What plans ask of Megatron's options for experts."""

from typing import Any

from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.partition import Partition

__all__ = ["check_expert_plans", "loss_over_microbatch", "one_by_one"]


def check_expert_plans(config: Any, model: ModelShape, partition: Partition) -> None:
    """Refuse options for experts that do not work with plans of ``model`` under ``partition``.

    Args:
        config: Megatron's configuration of the module with the loss, or arguments of these names.

    Raises:
        UnsupportedError: Names the flag, its value and the remedy.
    """
    for module in model.modules:
        if module.has_experts:
            _check_balancing(config, module, partition)
            _check_not_split(config, module, partition)
            _check_shared(config, module, model)


def _check_balancing(config: Any, module: ModuleShape, partition: Partition) -> None:
    """Some ways to balance experts look beyond a microbatch, or at all tokens of one."""
    for name in one_by_one(config, "moe_router_load_balancing_type", "aux_loss"):
        flag = f"--moe-router-load-balancing-type {name} does not work with"
        if name == "global_aux_loss":
            raise UnsupportedError(
                f"{flag} --dip-schedule: every forward would count the tokens of the same forward "
                f"on all replicas, whose plans are in another order (use aux_loss or seq_aux_loss)"
            )
        tokens = partition.sub_microbatch_tokens.get(module.name)
        if name in ("sinkhorn", "quantile_balancing") and tokens is not None:
            raise UnsupportedError(
                f"{flag} sub_microbatch_tokens {tokens} of module {module.name}: where a token "
                f"goes depends on all tokens of a microbatch (remove sub_microbatch_tokens of "
                f"{module.name} from the schedule, or use another way)"
            )


def _check_not_split(config: Any, module: ModuleShape, partition: Partition) -> None:
    """An auxiliary loss is a mean or a product of means over a microbatch, not a sum over it."""
    tokens = partition.sub_microbatch_tokens.get(module.name)
    if tokens is None:
        return
    if getattr(config, "moe_expert_capacity_factor", None) is not None:
        raise UnsupportedError(
            f"--moe-expert-capacity-factor does not work with sub_microbatch_tokens {tokens} of "
            f"module {module.name}: which tokens are dropped depends on all tokens of a microbatch "
            f"(remove sub_microbatch_tokens of {module.name} from the schedule, or leave the flag "
            f"out)"
        )
    coefficient = sum(one_by_one(config, "moe_aux_loss_coeff", 0.0))
    z_coefficient = getattr(config, "moe_z_loss_coeff", None)
    if not (coefficient or z_coefficient):
        return
    flag = f"--moe-aux-loss-coeff {coefficient:g}"
    if not coefficient:
        flag = f"--moe-z-loss-coeff {z_coefficient:g}"
    raise UnsupportedError(
        f"{flag} does not work with sub_microbatch_tokens {tokens} of module {module.name}: the "
        f"auxiliary loss of a microbatch is not the sum of those of its parts (remove "
        f"sub_microbatch_tokens of {module.name} from the schedule, or set the coefficient to 0)"
    )


def _check_shared(config: Any, module: ModuleShape, model: ModelShape) -> None:
    """Replicas that share experts exchange different numbers of tokens, in every backward too."""
    size = getattr(config, "expert_model_parallel_size", 1)
    if size == 1:
        return
    dispatcher = getattr(config, "moe_token_dispatcher_type", "allgather")
    backend = getattr(config, "moe_flex_dispatcher_backend", "deepep")
    takes_any = dispatcher == "alltoall" or (dispatcher == "flex" and backend == "deepep")
    if not takes_any:
        if dispatcher == "flex":
            dispatcher += f" with --moe-flex-dispatcher-backend {backend}"
        raise UnsupportedError(
            f"--moe-token-dispatcher-type {dispatcher} does not work with "
            f"--expert-model-parallel-size {size} and --dip-schedule: use 'alltoall' (or 'flex' "
            f"with 'deepep'); the replicas have different numbers of tokens"
        )
    backward = model.modules_with_backward()
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


def loss_over_microbatch(options: Any) -> str | None:
    """The flag by which what experts compute, or their loss, depends on which samples are in a
    microbatch together; None where nothing does.

    Args:
        options: Megatron's arguments, or its configuration of the module with the loss.
    """
    if not (getattr(options, "num_experts", None) or getattr(options, "num_moe_experts", None)):
        return None
    balances = one_by_one(options, "moe_router_load_balancing_type", "aux_loss") != ["none"]
    coefficient = sum(one_by_one(options, "moe_aux_loss_coeff", 0.0))
    if balances and coefficient:
        return f"--moe-aux-loss-coeff {coefficient:g}"
    for name in ("moe_z_loss_coeff", "moe_expert_capacity_factor"):
        value = getattr(options, name, None)
        if value:
            return f"--{name.replace('_', '-')} {value:g}"
    return None


def one_by_one(options: Any, name: str, default: Any) -> list[Any]:
    """The values of an option that takes one or several."""
    value = getattr(options, name, default)
    return list(value) if isinstance(value, list | tuple) else [value]
