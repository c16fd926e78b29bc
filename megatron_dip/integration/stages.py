"""The stages of this rank, from a script's own builder of models.

Two doors of Megatron lead here, see ``hooks``: ``get_model`` with a provider, and the builder of a
``ModelConfig``.  Chunks stay of the model's own class; where one belongs, and what runs it, hangs
on it as ``dip``.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_dip.config import build_partition
from megatron_dip.costs import ModelShape
from megatron_dip.costs.builder import measured_model
from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.expert_rules import check_expert_plans
from megatron_dip.integration.groups import gather_distinct
from megatron_dip.integration.offload_rules import check_offloads
from megatron_dip.integration.options import DipOptions
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.problems import run_builder
from megatron_dip.integration.recut import check_recut
from megatron_dip.integration.run_arguments import run_arguments
from megatron_dip.integration.tensor_overlap import check_tensor_overlap
from megatron_dip.integration.weight_gradients import delay_weight_gradients, require_delays
from megatron_dip.models.facts import gather_facts, read_facts
from megatron_dip.models.registry import ModelRegistry
from megatron_dip.models.staged import Part, RunFacts, StagedModel
from megatron_dip.partition import Partition, Stage

__all__ = ["CallBuilder", "ChunkList", "Place", "build_stages", "check_division", "place_of"]

CallBuilder = Callable[[bool, bool], torch.nn.Module]
"""Calls a script's builder with ``pre_process`` and ``post_process``."""


class ChunkList(list[torch.nn.Module]):
    """The chunks of one rank; Megatron sets attributes on it as on a model."""


@dataclass(frozen=True)
class Place:
    """Where a chunk belongs."""

    stage: Stage
    pipeline: DipPipeline
    """The same object for all chunks of a rank."""


def place_of(chunk: torch.nn.Module) -> Place:
    """Of a chunk in whatever it is wrapped.

    Raises:
        UnsupportedError: It was not built by :func:`build_stages`.
    """
    try:
        place = get_attr_wrapped_model(chunk, "dip")
    except RuntimeError:
        place = None
    if not isinstance(place, Place):
        raise UnsupportedError(
            "--dip-schedule was given but the model did not come through Megatron's get_model or "
            "the builder of a ModelConfig (build it there, as Megatron's own scripts do)"
        )
    return place


def build_stages(call_builder: CallBuilder, options: DipOptions) -> ChunkList:
    """All stages of this rank; a collective call of the whole world.

    Raises:
        UnsupportedError: The model cannot be cut; says why.
        ConfigError: The configuration does not fit the model or the launch.
        PartitionError: Nor does the cut.
    """
    registry = ModelRegistry(options.models)
    asked = registry.ask(lambda: call_builder(True, True))
    staged = asked.staged_type(asked.arguments, _run_facts())
    check_division(staged)
    shapes = staged.modules()
    partition = build_partition(
        options.config.schedule,
        {shape.name: shape.num_layers for shape in shapes},
        mpu.get_pipeline_model_parallel_world_size(),
    )
    for module in partition.sub_microbatch_tokens:
        staged.check_split(module)
    chunks = {}
    for stage in _own_stages(partition, shapes[-1].name):
        part = Part.of(partition, stage)
        builder = partial(call_builder, part.first, part.last)
        chunks[stage] = registry.build(builder, staged, part)
    _ask_as_often_as_others(registry, call_builder, partition)
    run_config = get_model_config(next(iter(chunks.values())))
    model = ModelShape(name="model", modules=shapes)
    check_expert_plans(run_config, model, partition)
    check_recut(options.config.schedule, staged, run_config, run_arguments())
    check_tensor_overlap(run_config, model, partition, varies_parts=options.vary_parts)
    if options.config.schedule.offload is not None:
        check_offloads(chunks, run_config)
    own = [read_facts(chunk, Part.of(partition, stage)) for stage, chunk in chunks.items()]
    if options.config.schedule.split_backward:
        num_delaying = sum(delay_weight_gradients(chunk) for chunk in chunks.values())
        counts = [count for (count,) in gather_distinct([num_delaying])]
        require_delays(counts, run_config)
    facts = gather_facts(own, mpu.get_pipeline_model_parallel_group())
    pipeline = DipPipeline(
        options=options,
        staged=staged,
        partition=partition,
        problems=run_builder(
            options.config.schedule,
            measured_model(model, facts),
            partition,
            run_config,
            optimizer_shards=options.optimizer_shards,
        ),
        dtype=run_config.pipeline_dtype or run_config.params_dtype,
    )
    for stage, chunk in chunks.items():
        chunk.dip = Place(stage, pipeline)  # type: ignore[assignment]
    return ChunkList(chunks.values())


def _own_stages(partition: Partition, outermost: str) -> list[Stage]:
    """The stages of this rank, those of the module with the loss outermost.

    Megatron's reduction of embedding gradients expects the embedding in the first chunk of the
    first rank and the head in the last chunk of the last rank.
    """
    stages = partition.stages_on(mpu.get_pipeline_model_parallel_rank())
    entry = partition.first_stage(outermost)
    return sorted(stages, key=lambda stage: (stage != entry, stage.module == outermost))


def _ask_as_often_as_others(
    registry: ModelRegistry, call_builder: CallBuilder, partition: Partition
) -> None:
    """Call the builder equally often on all ranks, in case it holds a collective call."""
    num_stages = Counter(stage.rank for stage in partition.stages)
    own = num_stages[mpu.get_pipeline_model_parallel_rank()]
    for _ in range(max(num_stages.values()) - own):
        registry.ask(partial(call_builder, True, True))


def check_division(staged: StagedModel) -> None:
    """
    Raises:
        UnsupportedError: Rows of samples are to be divided, and the class does not do that.
    """
    num_ranks = staged.run.num_context_ranks
    if num_ranks > 1 and not staged.divides_rows:
        raise UnsupportedError(
            f"--context-parallel-size {num_ranks} with --dip-schedule: {type(staged).__name__} "
            f"does not divide the rows of a sample among ranks (use 1; "
            f"--tensor-model-parallel-size with --sequence-parallel divides activations as well)"
        )


def _run_facts() -> RunFacts:
    return RunFacts(
        num_pipeline_ranks=mpu.get_pipeline_model_parallel_world_size(),
        num_tensor_ranks=mpu.get_tensor_model_parallel_world_size(),
        num_context_ranks=mpu.get_context_parallel_world_size(),
    )
