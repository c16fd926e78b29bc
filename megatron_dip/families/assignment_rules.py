"""Which runs may move samples: where the gradients stay what they are."""

import argparse

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.lavin.config import LavinConfig
from megatron_dip.integration.expert_rules import loss_over_microbatch

__all__ = ["check_assignment"]

_REMEDY = "use microbatches, which moves whole ones, or none"


def check_assignment(args: argparse.Namespace, path: str, config: FamilyConfig) -> None:
    """Refuse ``schedule.assignment`` of ``config``, read from ``path``, where it would train
    something else.

    Raises:
        ConfigError: It does not fit the model or a flag; says why and what to do.
        UnsupportedError: The order of samples is not known beforehand.
    """
    moves = config.schedule.assignment
    if moves == "none":
        return
    stated = f"{path}: schedule.assignment {moves} does not work with"
    if args.dataloader_type == "cyclic":
        raise UnsupportedError(
            f"{stated} --dataloader-type cyclic, by which batches go on across epochs: leave the "
            f"flag out; every epoch is shuffled without it"
        )
    if moves == "microbatches":
        return
    if not args.calculate_per_token_loss:
        raise ConfigError(
            f"{stated} a loss that is the mean of the means of microbatches: a sample that moves "
            f"would weigh more or less (add --calculate-per-token-loss, or {_REMEDY})"
        )
    if isinstance(config, LavinConfig) and config.model.adapter.gates == "public_code":
        raise ConfigError(
            f"{stated} model.adapter.gates public_code, by which a sample depends on the others of "
            f"its microbatch ({_REMEDY})"
        )
    flag = loss_over_microbatch(args)
    if flag is not None:
        raise ConfigError(
            f"{stated} {flag}, which is taken over all tokens of a microbatch ({_REMEDY})"
        )
