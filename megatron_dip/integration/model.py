"""The model of a run, for either schedule, from the same stages.

Under ``--dip-schedule`` a rank holds one chunk per stage.  Without, it holds what Megatron's own
schedule wants; the family of the model says what that is.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args

from megatron_dip.config import load_config
from megatron_dip.errors import ConfigError
from megatron_dip.integration.accounting import (
    BatchAccounting,
    planned_memory,
    stock_memory,
    use_accounting,
)
from megatron_dip.integration.chunks import ChunkList, DipChunk
from megatron_dip.integration.families import StageFactory, family_of
from megatron_dip.integration.learning_rates import use_learning_rate_factors
from megatron_dip.integration.pipeline import DipPipeline, run_builder
from megatron_dip.integration.rules import Rule, check_rules
from megatron_dip.integration.trained_checkpoints import remember_trained
from megatron_dip.partition import Stage

__all__ = ["build_model"]

_STOCK_RULES = tuple(
    Rule(flag=flag, destination=destination, allowed=(None,))
    for flag, destination in (
        ("--pipeline-model-parallel-layout", "pipeline_model_parallel_layout"),
        ("--num-layers-per-virtual-pipeline-stage", "num_layers_per_virtual_pipeline_stage"),
        ("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank"),
    )
)


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
        ConfigError: There is no ``--dip-config``, or it does not fit the launch.
        UnsupportedError: Megatron's own schedule was asked for a cut that the model does not have.
    """
    args = get_args()
    if not args.dip_config:
        raise ConfigError("the model is described by --dip-config FILE, which was not given")
    dip_config = load_config(args.dip_config)
    use_learning_rate_factors(args, dip_config)
    remember_trained(args, dip_config)
    base = config or core_transformer_config_from_args(args)
    family = family_of(dip_config)
    factory = family.stage_factory(dip_config, base, args.seed)
    if args.dip_schedule:
        device = torch.device("cuda", torch.cuda.current_device())
        pipeline = DipPipeline(
            dip_config,
            base,
            factory.boundaries(),
            args.dip_timeout_seconds,
            device,
            planner_cores=args.dip_planner_cores,
        )
        use_accounting(BatchAccounting(dip_config, planned_memory(pipeline)))
        return _build_chunks(factory, pipeline)
    check_rules(args, _STOCK_RULES, "with this model under Megatron's own schedule")
    builder = run_builder(dip_config, base)
    use_accounting(BatchAccounting(dip_config, stock_memory(builder, factory.loss_config)))
    return factory.stock_model(
        pre_process=pre_process,
        post_process=post_process,
        idle=family.smallest_data(dip_config),
    )


def _build_chunks(factory: StageFactory, pipeline: DipPipeline) -> ChunkList:
    """The stages of this rank, those of the module with the loss outermost.

    Megatron's reduction of embedding gradients expects the embedding in the first chunk of the
    first rank and the head in the last chunk of the last rank.
    """
    stages = pipeline.partition.stages_on(pipeline.rank)
    outermost = pipeline.config.model_shape().modules[-1].name
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
