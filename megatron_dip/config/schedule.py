"""What a configuration says of the schedule, whatever the model is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.errors import ConfigError
from megatron_dip.forms import Form
from megatron_dip.limits import (
    MOST_EVALUATIONS,
    MOST_PLANNERS,
    Layer,
    Layers,
    Positive,
    Ranks,
    Rate,
    Size,
    Time,
)
from megatron_dip.partition import (
    Partition,
    cut_evenly,
    load_partition,
    partition_from_layers,
)
from megatron_dip.workload import HostLink

__all__ = [
    "CostConfig",
    "DipConfig",
    "ModuleSchedule",
    "OffloadConfig",
    "PlanningConfig",
    "ScheduleConfig",
    "build_partition",
]


class ModuleSchedule(Form):
    """How one module is cut, and its share of a microbatch split."""

    num_segments: Layers | None = None
    """As many as ``layers`` has, or one, where not given."""
    layers: tuple[tuple[Layer, ...], ...] | None = None
    """Layers per segment and rank; cut evenly where not given."""
    sub_microbatch_tokens: Positive | None = None
    """Most tokens in a sub-microbatch; a microbatch is not split where not given."""
    flops_per_us: Rate | None = None
    """What one rank achieves on this module; ``costs.flops_per_us`` where not given."""


_CUT_FIELDS = {"num_segments", "layers", "sub_microbatch_tokens"}


class CostConfig(Form):
    """Rates of the machine that the planner assumes; only their proportions shape a schedule."""

    profile: Path | None = None
    """Measured times of layers, as ``megatron-dip profile`` writes them; the rates of operations
    below are then not used."""
    flops_per_us: Rate = 4.0e8
    """Floating-point operations per microsecond that one rank achieves."""
    layer_overhead_us: Time = 60.0
    transfer_latency_us: Time = 20.0
    transfer_bytes_per_us: Rate = 40000.0
    feedback: bool = True
    """Correct times by what steps measure, per stage. Plans then follow the machine, and two runs
    on the same data may plan differently; the log tells the error of predictions either way."""


class OffloadConfig(Form):
    """The link to the host that activations may be offloaded over."""

    link_gb_per_s: Annotated[float, Field(ge=0.1, le=1e6)]
    """10^9 bytes per second, in each direction, without what else uses the link."""
    ranks_per_link: Size = 1
    """That offload over one link at the same time, and share its rate."""
    host_memory_gib: Annotated[float, Field(gt=0, le=2**30)]
    """Per rank: of the host's memory, for activations."""
    latency_us: Time = 20.0

    def link(self, num_ranks: int) -> HostLink:
        """What a problem says of it."""
        return HostLink(
            latency_us=self.latency_us,
            bytes_per_us=self.link_gb_per_s * 1000 / self.ranks_per_link,
            memory_bytes=(int(self.host_memory_gib * 2**30),) * num_ranks,
        )


class ScheduleConfig(Form):
    """What ``--dip-schedule`` runs."""

    num_ranks: Ranks | None = None
    """Pipeline ranks the cut is made for; where given, --pipeline-model-parallel-size must be
    equal."""
    planner: Literal["dual_queue", "one_f_one_b"] = "dual_queue"
    evaluations: Annotated[int, Field(ge=0, le=MOST_EVALUATIONS)] = 64
    """Orders of a batch that the dual queue tries before it takes the best; 0 tries one."""
    split_backward: bool = False
    """Plan input and weight gradients apart, so that the latter fill gaps. Needs layers that keep
    them apart: Transformer Engine's, from 2.8 on. Beside ``plan``: run its two parts as two."""
    partition: Path | None = None
    """A cut as ``megatron-dip partition`` writes it; modules then state none."""
    modules: dict[str, ModuleSchedule] = Field(default={})
    """By module of the model; one that is not named, and is in no ``partition``, is cut evenly into
    one segment."""
    hardware_queues: Literal["auto", "one", "many"] = "auto"
    """What plans are made for: streams of a GPU that share one hardware queue, or have one each.
    ``auto`` is one on GPUs, unless CUDA_DEVICE_MAX_CONNECTIONS is at least 32, and many on CPUs."""
    plan: Path | None = None
    """One plan for all batches, of several problems as ``megatron-dip plan`` makes it: every batch
    runs what it has of it, in its order."""
    assignment: Literal["none", "microbatches", "samples"] = "none"
    """What of a global batch moves before it is planned, so that replicas and microbatches have
    alike costs: nothing, whole microbatches between replicas, or samples between microbatches."""
    memory_limit_gib: Annotated[float, Field(gt=0, le=2**30)] = 80.0
    """Per rank, weights included."""
    offload: OffloadConfig | None = None
    """Activations go to the host where the limit is short and this link can take them; none do
    where it is not given."""
    costs: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check_unread(self) -> Self:
        stated = self.model_fields_set
        if self.plan is not None:
            _refuse(
                sorted({"planner", "evaluations"} & stated),
                "plan (expected one of them: with a plan for all batches none is made)",
            )
        if self.planner == "one_f_one_b":
            _refuse(
                ["offload"] if self.offload is not None else [],
                "planner one_f_one_b, which does not look at memory (expected planner dual_queue)",
            )
            _refuse(
                sorted({"evaluations"} & stated),
                "planner one_f_one_b, which makes no search (leave it out, or take dual_queue)",
            )
        if self.costs.profile is not None:
            rates = sorted({"flops_per_us", "layer_overhead_us"} & self.costs.model_fields_set)
            own = [name for name, module in self.modules.items() if module.flops_per_us is not None]
            _refuse(
                [
                    *(f"costs.{name}" for name in rates),
                    *(f"modules.{name}.flops_per_us" for name in own),
                ],
                "costs.profile, whose measured times are used instead (leave one or the other out)",
            )
        return self

    @property
    def makes_no_search(self) -> str | None:
        """What says so; None where batches are searched."""
        if self.plan is not None:
            return "schedule.plan"
        if self.planner == "one_f_one_b":
            return "schedule.planner one_f_one_b"
        return "schedule.evaluations 0" if self.evaluations == 0 else None


def _refuse(stated: Sequence[str], beside: str) -> None:
    """Raise ValueError if something is stated that has no effect beside something else."""
    if stated:
        raise ValueError(f"states {list(stated)} beside {beside}")


class PlanningConfig(Form):
    """How plans are made beside training."""

    look_ahead: Annotated[int, Field(ge=1, le=16)] = 2
    """Batches that are held while one trains; with fewer than 2 training waits for every plan."""
    workers: Annotated[int, Field(gt=0, le=MOST_PLANNERS)] = 1
    """Planner processes of every pipeline."""
    searches: Annotated[int, Field(gt=0, le=MOST_PLANNERS)] = 1
    """Searches of a batch at the same time that share what they find, a core each; they divide
    ``schedule.evaluations``.  Plans depend on their number, and not on the cores there are."""
    wait_limit_ms: Annotated[float, Field(ge=0, le=1e9)] = 1000.0
    """The longest that training waits for a plan that is late, before it takes a lesser one."""
    search_limit_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """The longest that a batch is searched; most of the measured time of a step if not given."""
    worker_memory_gib: Annotated[float, Field(ge=0.5, le=2**20)] = 4.0
    """The most that a planner process may hold; with less than half a GiB it cannot start."""


class DipConfig(Form):
    """What ``--dip-schedule`` reads of the file of ``--dip-config``; all of it may be left out.

    A script may read more of the file, see :func:`megatron_dip.config.load.load_dip_config`.
    """

    schedule: ScheduleConfig = ScheduleConfig()
    planning: PlanningConfig = PlanningConfig()

    @model_validator(mode="after")
    def _check_searches(self) -> Self:
        reason = self.schedule.makes_no_search
        planning = self.planning.model_fields_set
        if reason is not None:
            given = sorted({"searches", "search_limit_ms"} & planning)
            _refuse(
                [f"planning.{name}" for name in given if getattr(self.planning, name) is not None],
                f"{reason}, by which no batch is searched (leave them out, or let planner "
                f"dual_queue make evaluations)",
            )
        return self

    @model_validator(mode="after")
    def _check_cut(self) -> Self:
        if self.schedule.partition is None:
            return self
        for name, module in self.schedule.modules.items():
            stated = sorted(_CUT_FIELDS & module.model_fields_set)
            if stated:
                raise ValueError(
                    f"schedule.modules.{name} states {stated} beside schedule.partition (expected "
                    f"the cut in one place: remove one of them)"
                )
        return self


def build_partition(
    schedule: ScheduleConfig, num_layers: Mapping[str, int], num_ranks: int
) -> Partition:
    """The partition that ``schedule`` describes or names; even where it says nothing.

    Args:
        num_layers: Layers per module, upstream modules first.
        num_ranks: Pipeline ranks.

    Raises:
        PartitionError: Layer counts do not fit the module or the number of ranks, or a rank has no
            stage.
        ConfigError: A module that the model does not have, or segments and layers of one that
            contradict one another.
    """
    unknown = sorted(set(schedule.modules) - set(num_layers))
    if unknown:
        raise ConfigError(
            f"schedule.modules names {sorted(schedule.modules)} (expected some of "
            f"{sorted(num_layers)}: the modules of the model)"
        )
    if schedule.partition is not None:
        loaded = load_partition(schedule.partition)
        loaded.check_layers(num_layers, num_ranks)
        loaded.check_ranks(num_ranks)
        return loaded
    layers, sizes = {}, {}
    for name, count in num_layers.items():
        module = schedule.modules.get(name, ModuleSchedule())
        cut = module.layers or _even_cut(count, module.num_segments, num_ranks)
        total = sum(sum(segment) for segment in cut)
        num_segments = module.num_segments or len(cut)
        if total != count or len(cut) != num_segments:
            raise ConfigError(
                f"schedule.modules.{name}.layers: {len(cut)} segments with {total} layers "
                f"(expected num_segments {num_segments} with {count} layers)"
            )
        layers[name] = cut
        if module.sub_microbatch_tokens is not None:
            sizes[name] = module.sub_microbatch_tokens
    made = partition_from_layers(layers, num_ranks)
    made.check_ranks(num_ranks)
    return made.model_copy(update={"sub_microbatch_tokens": sizes})


def _even_cut(
    num_layers: int, num_segments: int | None, num_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """Of a module with fewer layers than ranks, of which nothing is said, the first ranks have
    one each."""
    if num_segments is None and num_layers < num_ranks:
        return (tuple(int(rank < num_layers) for rank in range(num_ranks)),)
    return cut_evenly(num_layers, num_segments or 1, num_ranks)
