"""A checkpoint says what was trained: one whose optimizer does not fit is refused in a line.

Weights fit whatever is trained.  The state of an optimizer is of the trained weights alone, in
groups by learning rate: Megatron would miss some of it deep inside its loading.
"""

import argparse
import functools
from typing import Any

from megatron.training import checkpointing

from megatron_dip.errors import ConfigError, shown
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.versions import needed

__all__ = ["describe_trained", "remember_trained"]

_NAME = "dip_trained"
_HOOKED = "_load_base_checkpoint"


def describe_trained(config: FamilyConfig) -> dict[str, str]:
    """Per module, what of it is trained and how fast; equal where optimizers fit each other."""
    found = {}
    for module in config.model_shape().modules:
        form = config.module_forms()[module.name]
        extras = sorted(module.trained.parts - {"layers"})
        layers = [f"layers {r.start} to {r.stop - 1}" for r in module.trained.layers]
        adapters = ["adapters"] if module.trains_adapters else []
        rates = form.learning_rate_factor
        text = ", ".join(extras + layers + adapters) or "nothing"
        found[module.name] = text if rates == 1.0 else f"{text} at {rates} of the learning rate"
    return found


def remember_trained(args: argparse.Namespace, config: FamilyConfig) -> None:
    """Have this run's checkpoints say what ``config`` trains, and those that it loads be asked."""
    setattr(args, _NAME, describe_trained(config))
    load = needed(checkpointing, _HOOKED)
    if getattr(load, "asks_what_is_trained", False):
        return

    @functools.wraps(load)
    def asking(load_dir: Any, args: argparse.Namespace, *given: Any, **named: Any) -> Any:
        result = load(load_dir, args, *given, **named)
        _check_loaded(load_dir, args, (result[0] or {}).get("args"))
        return result

    asking.asks_what_is_trained = True  # type: ignore[attr-defined]
    setattr(checkpointing, _HOOKED, asking)


def _check_loaded(load_dir: Any, args: argparse.Namespace, saved_args: Any) -> None:
    """
    Raises:
        ConfigError: The optimizer of the checkpoint would be loaded, and is of other parts.
    """
    own, saved = getattr(args, _NAME, None), getattr(saved_args, _NAME, None)
    if args.finetune or args.no_load_optim or own is None or saved is None:
        return
    for module in own:
        if saved.get(module) != own[module]:
            raise ConfigError(
                f"{load_dir} was saved by a run that trains of {module}: "
                f"{shown(saved.get(module))}; this one trains {shown(own[module])} (go on from its "
                f"weights with --finetune, or train the same)"
            )
