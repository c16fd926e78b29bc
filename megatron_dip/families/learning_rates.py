"""Learning rates by part, through Megatron's own groups of parameters.

The configuration multiplies the run's learning rate by a factor, in a module or in some of its
parts.  Megatron builds its groups from overrides of the optimizer's configuration; those of ours
are added where its training loop makes them, so that schedules, logs, checkpoints and distributed
optimizers treat the groups as they treat Megatron's own (``--decoupled-lr``).
"""

import argparse
import functools
from collections.abc import Iterable
from typing import Any

from megatron.training import training

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.packed.parts import learning_rate_factor
from megatron_dip.integration.versions import needed

__all__ = ["add_factor_overrides", "factors_of", "use_learning_rate_factors"]

_HOOKED = "get_megatron_optimizer_config"


def factors_of(config: FamilyConfig) -> tuple[float, ...]:
    """The factors other than 1 of parts that are trained, ascending."""
    shapes = config.model_shape()
    found: set[float] = set()
    for name, form in config.module_forms().items():
        factor = form.learning_rate_factor
        factors = form.learning_rate_factors.values() if isinstance(factor, dict) else (factor,)
        if shapes.module(name).trains_any:
            found.update(factors)
    return tuple(sorted(found - {1.0}))


def use_learning_rate_factors(args: argparse.Namespace, config: FamilyConfig) -> None:
    """Have the optimizer of this run made with the factors of ``config``.

    Raises:
        UnsupportedError: Another option sets learning rates of single parameters.
    """
    factors = factors_of(config)
    if not factors:
        return
    for destination in ("decoupled_lr", "use_mup"):
        value = getattr(args, destination, None)
        if value:
            raise UnsupportedError(
                f"--{destination.replace('_', '-')} does not work with learning_rate_factor in "
                f"{args.dip_config}: both set the learning rates of single parameters (leave one "
                f"of them out)"
            )
    make_config = needed(training, _HOOKED)
    if getattr(make_config, "dip_factors", None) == factors:
        return

    @functools.wraps(make_config)
    def with_factors(*given: Any, **named: Any) -> tuple[Any, Any]:
        optimizer_config, overrides = make_config(*given, **named)
        return optimizer_config, add_factor_overrides(optimizer_config, overrides, factors)

    with_factors.dip_factors = factors  # type: ignore[attr-defined]
    setattr(training, _HOOKED, with_factors)


def add_factor_overrides(
    optimizer_config: Any, overrides: dict[Any, Any] | None, factors: Iterable[float]
) -> dict[Any, Any]:
    """Megatron's ``overrides`` and those of parameters with one of ``factors``."""
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    added = dict(overrides or {})
    for factor in factors:
        predicate = ParamPredicate(
            name=f"dip_learning_rate_factor_{factor!r}",
            fn=functools.partial(_has_factor, factor),
        )
        added[ParamKey(predicate=predicate)] = ParamGroupOverride(
            max_lr=factor * optimizer_config.lr, min_lr=factor * (optimizer_config.min_lr or 0.0)
        )
    return added


def _has_factor(factor: float, parameter: Any) -> bool:
    return learning_rate_factor(parameter) == factor
