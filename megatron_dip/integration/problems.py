"""What makes the problems of a run's batches: shapes of its modules, its precision and ranks."""

from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.config import ScheduleConfig
from megatron_dip.costs import ModelShape, ProblemBuilder, config_builder
from megatron_dip.integration import cpu_mode
from megatron_dip.integration.kernels import kernels_of
from megatron_dip.partition import Partition

__all__ = ["run_builder"]


def run_builder(
    schedule: ScheduleConfig,
    model: ModelShape,
    partition: Partition,
    config: TransformerConfig,
    *,
    optimizer_shards: int,
) -> ProblemBuilder:
    """Problems of the model that is cut so.

    Args:
        model: With the weights of its built stages.
        config: Megatron's configuration of the run.
        optimizer_shards: Ranks that share one optimizer state.

    Raises:
        ConfigError: The profile that the schedule names cannot be used.
    """
    return config_builder(
        schedule,
        model,
        partition,
        num_ranks=mpu.get_pipeline_model_parallel_world_size(),
        kernels=kernels_of(config, on_cpu=cpu_mode.is_enabled()),
        num_tensor_ranks=mpu.get_tensor_model_parallel_world_size(),
        num_context_ranks=mpu.get_context_parallel_world_size(),
        num_expert_ranks=mpu.get_expert_model_parallel_world_size(),
        sequence_parallel=config.sequence_parallel,
        optimizer_shards=optimizer_shards,
    )
