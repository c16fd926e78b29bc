"""Builders for a machine: from a run's configuration, and from a cluster's."""

import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_dip.config import CostConfig, OffloadConfig, ScheduleConfig
from megatron_dip.costs.analytic import AnalyticTimes, LayerTimes
from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.devices import Device, device_preset
from megatron_dip.costs.kernels import Kernels
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.profile import Profile, ProfiledTimes, load_profile
from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.errors import ConfigError
from megatron_dip.forms import Form
from megatron_dip.limits import MemoryLimit, Positive, PositiveNumber, Ranks, Size, Time
from megatron_dip.partition import Partition
from megatron_dip.reading import read_yaml
from megatron_dip.workload import HostLink, TransferCost

__all__ = ["Assumptions", "ClusterConfig", "cluster_builder", "config_builder", "load_cluster"]

_GIB = 1024**3


class Assumptions(Form):
    """What replaces the preset's rates, and what layers hold; nothing does where a field is not
    given."""

    efficiency: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    """Share of the peak achieved at every size, instead of the preset's curve."""
    layer_overhead_us: Time | None = None
    memory_traffic: bool = True
    """False: only operations take time."""
    collectives: bool = True
    """False: collectives inside a layer take no time."""
    optimizer_state: bool = True
    """False: it lies elsewhere, so that a weight takes 6 bytes with its gradient."""
    activation_bytes_per_value: PositiveNumber | None = None
    """Kept by every layer per token and hidden value, and nothing by what sits before and after
    the layers, instead of what their backwards read."""


class ClusterConfig(Form):
    """A cluster, and how a model is laid over it."""

    name: Annotated[str, Field(min_length=1)]
    gpu: str
    """A preset: A100, H100, H200 or H800."""
    num_gpus: Positive
    gpus_per_node: Size = 8
    tensor_parallel: Size = 1
    context_parallel: Size = 1
    expert_parallel: Size = 1
    """Ranks of different replicas among which experts are divided."""
    pipeline_parallel: Ranks
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    """Optimizer state divided over the data-parallel (and context-parallel) ranks."""
    memory_limit_bytes: Annotated[MemoryLimit, Field(gt=0)] | None = None
    """Per GPU; all of the preset's memory where not given."""
    offload: OffloadConfig | None = None
    """A GPU's link to its host, where activations may be offloaded."""
    transfer_latency_us: Time = 20.0
    assumptions: Assumptions = Assumptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        device_preset(self.gpu)
        if self.num_gpus % self.num_model_gpus:
            raise ValueError(
                f"num_gpus {self.num_gpus} is not a multiple of tensor_parallel x context_parallel "
                f"x pipeline_parallel = {self.num_model_gpus}: change one of them"
            )
        if self.data_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel {self.expert_parallel} does not divide the {self.data_parallel} "
                f"replicas of the model"
            )
        return self

    @property
    def num_model_gpus(self) -> int:
        """GPUs of one replica of the model."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel

    @property
    def data_parallel(self) -> int:
        return self.num_gpus // self.num_model_gpus

    @property
    def parallel(self) -> Parallelism:
        return Parallelism(
            tensor=self.tensor_parallel,
            context=self.context_parallel,
            expert=self.expert_parallel,
            sequence_parallel=self.sequence_parallel,
        )

    def device(self) -> Device:
        """The preset under the assumptions."""
        assumed = self.assumptions
        device = device_preset(self.gpu)
        if assumed.efficiency is not None:
            device = device.with_constant_rate(assumed.efficiency)
        if assumed.layer_overhead_us is not None:
            device = device.with_layer_overhead(assumed.layer_overhead_us)
        if not assumed.memory_traffic:
            device = device.without_memory_traffic()
        return device

    def link_bytes_per_us(self, ranks_per_group: int) -> float:
        """What neighbours achieve that sit ``ranks_per_group`` GPUs side by side."""
        device = device_preset(self.gpu)
        inside = ranks_per_group <= self.gpus_per_node
        published = device.nvlink_bytes_per_us if inside else device.network_bytes_per_us
        return published * device.link_efficiency

    def transfer(self) -> TransferCost:
        """Between pipeline ranks, which sit outermost: over the network where nodes differ."""
        return TransferCost(
            latency_us=self.transfer_latency_us,
            bytes_per_us=self.link_bytes_per_us(self.num_gpus),
        )


def load_cluster(path: str | Path) -> ClusterConfig:
    """The cluster in a YAML file.

    Raises:
        ConfigError: The file cannot be read, or a field is missing, unknown or contradicts another.
    """
    return ClusterConfig.parse(read_yaml(path), ConfigError, str(path))


def cluster_builder(
    model: ModelShape, cluster: ClusterConfig, profile: Profile | None = None
) -> ProblemBuilder:
    """Problems of ``model`` on ``cluster``: times measured where a profile is given.

    Raises:
        ConfigError: The model cannot be divided by ``tensor_parallel``, or the profile is of other
            layers.
    """
    parallel = cluster.parallel
    for module in model.modules:
        _check_division(module, parallel.tensor)
        _check_experts(module, parallel.expert)
    device = cluster.device()
    times: LayerTimes
    if profile is None:
        counted = cluster.assumptions.collectives
        inside = parallel.tensor * parallel.context
        times = AnalyticTimes(
            device=device if counted else device.without_collectives(),
            parallel=parallel,
            tensor_link_bytes_per_us=cluster.link_bytes_per_us(parallel.tensor)
            if counted
            else math.inf,
            ring_link_bytes_per_us=cluster.link_bytes_per_us(inside) if counted else math.inf,
        )
    else:
        times = ProfiledTimes.for_model(profile, model, parallel)
    shards = cluster.data_parallel * cluster.context_parallel
    return ProblemBuilder(
        model=model,
        times=times,
        memory=MemoryModel(
            parallel=parallel,
            optimizer_shards=shards if cluster.distributed_optimizer else 1,
            holds_optimizer=cluster.assumptions.optimizer_state,
            activation_bytes_per_value=cluster.assumptions.activation_bytes_per_value,
        ),
        num_ranks=cluster.pipeline_parallel,
        memory_limit_bytes=cluster.memory_limit_bytes or device.memory_bytes,
        transfer=cluster.transfer(),
        host_link=_link(cluster.offload, cluster.pipeline_parallel),
    )


def _link(offload: OffloadConfig | None, num_ranks: int) -> HostLink | None:
    return None if offload is None else offload.link(num_ranks)


def _check_division(module: ModuleShape, tensor: int) -> None:
    for field, value in (
        ("num_attention_heads", module.num_attention_heads),
        ("num_query_groups", module.query_groups),
        ("ffn_hidden_size", module.ffn_hidden_size),
        ("vocab_size", module.vocab_size or 0),
    ):
        if value % tensor:
            raise ConfigError(
                f"tensor_parallel {tensor} does not divide {module.name}.{field} {value}"
            )


def _check_experts(module: ModuleShape, expert: int) -> None:
    if module.experts is None:
        return
    if module.experts.num_experts % expert:
        raise ConfigError(
            f"expert_parallel {expert} does not divide {module.name}.experts.num_experts "
            f"{module.experts.num_experts}"
        )


def config_builder(
    schedule: ScheduleConfig,
    model: ModelShape,
    partition: Partition,
    *,
    num_ranks: int,
    kernels: Kernels,
    num_tensor_ranks: int = 1,
    num_context_ranks: int = 1,
    num_expert_ranks: int = 1,
    sequence_parallel: bool = False,
    optimizer_shards: int = 1,
) -> ProblemBuilder:
    """Problems of a run: at the times of ``schedule.costs.profile``, or at constant rates.

    Args:
        partition: How ``model`` is cut among the ``num_ranks`` pipeline ranks.
        kernels: What the run says of its layers.
        optimizer_shards: Ranks that share one optimizer state.

    Raises:
        ConfigError: The profile cannot be read, or was measured at other shapes or precision.
    """
    parallel = Parallelism(
        tensor=num_tensor_ranks,
        context=num_context_ranks,
        expert=num_expert_ranks,
        sequence_parallel=sequence_parallel,
    )
    for module in model.modules:
        _check_experts(module, num_expert_ranks)
    memory = MemoryModel(
        parallel=parallel,
        kernels=kernels,
        layers_per_stage=_layers_per_stage(model, partition),
        optimizer_shards=optimizer_shards,
    )
    times: LayerTimes
    if schedule.costs.profile is not None:
        profile = load_profile(schedule.costs.profile)
        _check_precision(profile, kernels.is_fp32)
        times = ProfiledTimes.for_model(profile, model, parallel)
    else:
        times = AnalyticTimes(
            device=_config_device(schedule.costs, schedule.costs.flops_per_us),
            module_devices={
                name: _config_device(schedule.costs, module.flops_per_us)
                for name, module in schedule.modules.items()
                if module.flops_per_us is not None
            },
            parallel=parallel,
            bytes_per_value=kernels.bytes_per_value,
            tensor_link_bytes_per_us=math.inf,
            ring_link_bytes_per_us=math.inf,
            kernels=kernels,
            layers_per_stage=memory.layers_per_stage,
        )
    return ProblemBuilder(
        model=model,
        times=times,
        memory=memory,
        num_ranks=num_ranks,
        memory_limit_bytes=int(schedule.memory_limit_gib * _GIB),
        transfer=TransferCost(
            latency_us=schedule.costs.transfer_latency_us,
            bytes_per_us=schedule.costs.transfer_bytes_per_us,
        ),
        host_link=_link(schedule.offload, num_ranks),
    )


def _layers_per_stage(model: ModelShape, partition: Partition) -> dict[str, float]:
    found: dict[str, float] = {}
    for module in model.modules:
        stages = [stage for stage in partition.chains[module.name] if stage.num_layers]
        found[module.name] = module.num_layers / max(1, len(stages))
    return found


def _check_precision(profile: Profile, is_fp32: bool) -> None:
    wanted = "fp32" if is_fp32 else "bf16"
    if profile.precision not in (None, wanted):
        raise ConfigError(
            f"profile: precision is {profile.precision}, but the run is in {wanted} "
            "(measure again in the precision of the run)"
        )


def _config_device(costs: CostConfig, flops_per_us: float) -> Device:
    """Only operations take time, and the overhead per layer stands for all else."""
    return Device(
        name="configured",
        peak_flops_per_us=flops_per_us,
        memory_bytes=0,
        memory_bytes_per_us=math.inf,
        nvlink_bytes_per_us=math.inf,
        network_bytes_per_us=math.inf,
        best_efficiency=1.0,
        half_rate_flops=0.0,
        layer_overhead_us=costs.layer_overhead_us,
        collective_latency_us=0.0,
    )
