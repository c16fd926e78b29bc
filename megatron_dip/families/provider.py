"""The model of a run, for either schedule, from the same stages.

Under ``--dip-schedule`` a rank holds one chunk per stage.  Without, it holds what Megatron's own
schedule wants; the family of the model says what that is.
"""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.accounting import (
    BatchAccounting,
    planned_memory,
    stock_memory,
    use_accounting,
)
from megatron_dip.families.base import StageFactory
from megatron_dip.families.configs import load_config
from megatron_dip.families.learning_rates import use_learning_rate_factors
from megatron_dip.families.registry import family_of
from megatron_dip.families.trained_checkpoints import remember_trained
from megatron_dip.integration.arguments import refusal_of_megatron, validation_of
from megatron_dip.integration.chunks import ChunkList, DipChunk
from megatron_dip.integration.pipeline import DipPipeline, run_builder
from megatron_dip.partition import Stage

__all__ = ["build_model"]


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: Any = None,
) -> torch.nn.Module | ChunkList:
    """Megatron's ``model_provider`` for the model in ``--dip-config``.

    Returns:
        A list of chunks under ``--dip-schedule``, else one model for Megatron's own schedule.

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
    base = config or _run_config(args)
    family = family_of(dip_config)
    factory = family.stage_factory(dip_config, base, args.seed)
    if args.dip_schedule:
        device = torch.device("cuda", torch.cuda.current_device())
        pipeline = DipPipeline(
            dip_config,
            factory.shape,
            base,
            factory.boundary,
            args.dip_timeout_seconds,
            device,
            planner_cores=args.dip_planner_cores,
        )
        use_accounting(BatchAccounting(dip_config, planned_memory(pipeline)))
        return _build_chunks(factory, pipeline)
    builder = run_builder(dip_config, factory.shape, base)
    use_accounting(BatchAccounting(dip_config, stock_memory(builder, factory.loss_config)))
    return factory.stock_model(
        pre_process=pre_process,
        post_process=post_process,
        idle=family.smallest_data(dip_config),
    )


def _run_config(args: Namespace) -> TransformerConfig:
    """Megatron's configuration of the run, which has checks of its own."""
    try:
        run_config: TransformerConfig = core_transformer_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise refusal_of_megatron(error) from error
    return run_config


def _build_chunks(factory: StageFactory, pipeline: DipPipeline) -> ChunkList:
    """The stages of this rank, those of the module with the loss outermost.

    Megatron's reduction of embedding gradients expects the embedding in the first chunk of the
    first rank and the head in the last chunk of the last rank.
    """
    stages = pipeline.partition.stages_on(pipeline.rank)
    outermost = pipeline.model.modules[-1].name
    entry = pipeline.partition.first_stage(outermost)
    ordered = sorted(stages, key=lambda stage: (stage != entry, stage.module == outermost))
    return ChunkList(_build_chunk(factory, pipeline, stage) for stage in ordered)


def _build_chunk(factory: StageFactory, pipeline: DipPipeline, stage: Stage) -> DipChunk:
    module = factory.build(
        stage.module,
        first_layer=stage.first_layer,
        num_layers=stage.num_layers,
        first=pipeline.partition.first_stage(stage.module) == stage,
        last=pipeline.partition.last_stage(stage.module) == stage,
    )
    return DipChunk(module, stage, factory.loss_config, pipeline)
