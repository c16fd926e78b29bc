"""The model of a run, for either schedule: Megatron's ``model_provider`` of these scripts."""

from argparse import Namespace
from typing import Any

from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_dip.costs import ProblemBuilder
from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.accounting import (
    BatchAccounting,
    planned_memory,
    stock_memory,
    use_accounting,
)
from megatron_dip.families.configs import load_config
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.learning_rates import use_learning_rate_factors
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.registry import family_of
from megatron_dip.families.trained_checkpoints import remember_trained
from megatron_dip.integration.arguments import optimizer_shards, refusal_of_megatron, validation_of
from megatron_dip.integration.problems import run_builder

__all__ = ["build_model", "problem_builder", "run_config"]


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> PackedModel:
    """Megatron's ``model_provider`` for the model in ``--dip-config``.

    Returns:
        The layers of this rank under Megatron's own schedule; under ``--dip-schedule`` the stage
        that is asked for.

    Raises:
        ConfigError: There is no ``--dip-config``, it does not fit the launch, or the ranks were
            given different inputs.
        UnsupportedError: The arguments were not checked by us.
        ChannelError: Another rank does not get as far.
    """
    args = get_args()
    if not args.dip_config:
        raise ConfigError("the model is described by --dip-config FILE, which was not given")
    validation = validation_of(args)
    if validation is None:
        raise UnsupportedError(
            "the arguments come from another place than the command line (--yaml-cfg?): give them "
            "as flags, so that they can be checked against --dip-config"
        )
    validation.compare_ranks()
    dip_config = load_config(args.dip_config)
    use_learning_rate_factors(args, dip_config)
    remember_trained(args, dip_config)
    base = config or run_config(args)
    family = family_of(dip_config)
    stages = family.stage_factory(dip_config, base, args.seed)
    model = stages.model_type(
        stages,
        pre_process=pre_process,
        post_process=post_process,
        idle=family.smallest_data(dip_config),
    )
    memory_of = (
        planned_memory(model)
        if args.dip_schedule
        else stock_memory(problem_builder(args, dip_config, base), stages.loss_config)
    )
    use_accounting(BatchAccounting(dip_config, memory_of))
    return model


def run_config(args: Namespace) -> TransformerConfig:
    """Megatron's configuration of the run, which has checks of its own.

    Raises:
        ConfigError: It does not fit.
    """
    try:
        made: TransformerConfig = core_transformer_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise refusal_of_megatron(error) from error
    return made


def problem_builder(
    args: Namespace, config: FamilyConfig, base: TransformerConfig
) -> ProblemBuilder:
    """Of the cut in the file, which may be for another number of ranks; nothing measured in it.

    Raises:
        ConfigError: The profile that the schedule names cannot be used.
    """
    num_ranks = config.schedule.num_ranks or mpu.get_pipeline_model_parallel_world_size()
    return run_builder(
        config.schedule,
        config.model_shape(),
        config.partition(num_ranks),
        base,
        optimizer_shards=optimizer_shards(args),
    )
