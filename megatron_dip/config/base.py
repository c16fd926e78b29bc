"""What the configurations of all model families share: the schedule, and rules between the parts.

A family adds the form of its model and of its data, see :class:`DipConfig`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_dip.errors import ConfigError
from megatron_dip.families.token_forms import TokensForm
from megatron_dip.forms import Form
from megatron_dip.limits import (
    MOST_EVALUATIONS,
    MOST_PLANNERS,
    Layer,
    Layers,
    Positive,
    PositiveNumber,
    Ranks,
    Rate,
    Time,
)
from megatron_dip.partition import (
    Partition,
    cut_evenly,
    load_partition,
    partition_from_layers,
)
from megatron_dip.text_form import OUR_TEXT_FORM, SpecialTokens, TextForm

if TYPE_CHECKING:
    from megatron_dip.costs.shapes import ModelShape
    from megatron_dip.families.forms import TransformerForm

__all__ = [
    "CostConfig",
    "DataForm",
    "DipConfig",
    "MegatronArguments",
    "ModuleSchedule",
    "PlanningConfig",
    "Positive",
    "PositiveNumber",
    "ScheduleConfig",
    "build_partition",
]

MegatronArguments = dict[str, int | float | str | bool | None]
"""Arguments of Megatron by their names in ``args``."""


class ModuleSchedule(Form):
    """How one module is cut, and its share of a microbatch split."""

    num_segments: Layers = 1
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


class ScheduleConfig(Form):
    """What ``--dip-schedule`` runs."""

    num_ranks: Ranks
    """Pipeline ranks the cut is made for; must equal --pipeline-model-parallel-size."""
    planner: Literal["dual_queue", "one_f_one_b"] = "dual_queue"
    evaluations: Annotated[int, Field(ge=0, le=MOST_EVALUATIONS)] = 64
    """Orders of a batch that the dual queue tries before it takes the best; 0 tries one."""
    partition: Path | None = None
    """A cut as ``megatron-dip partition`` writes it; modules then state none."""
    modules: dict[str, ModuleSchedule] = Field(default={})
    """One entry per module of the model, unless ``partition`` is given."""
    plan: Path | None = None
    """One plan for all batches, of several problems as ``megatron-dip plan`` makes it: every batch
    runs what it has of it, in its order."""
    memory_limit_gib: Annotated[float, Field(gt=0, le=2**30)] = 80.0
    """Per rank, weights included."""
    costs: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check_plan(self) -> Self:
        unread = sorted({"planner", "evaluations"} & self.model_fields_set)
        if self.plan is not None and unread:
            raise ValueError(
                f"states {unread} beside plan (expected one of them: with a plan for all batches "
                f"none is made)"
            )
        return self


class PlanningConfig(Form):
    """How plans are made beside training."""

    look_ahead: Annotated[int, Field(ge=1, le=16)] = 2
    """Batches that are held while one trains; with fewer than 2 training waits for every plan."""
    workers: Annotated[int, Field(gt=0, le=MOST_PLANNERS)] = 1
    """Planner processes of every pipeline."""
    wait_limit_ms: Annotated[float, Field(ge=0, le=1e9)] = 1000.0
    """The longest that training waits for a plan that is late, before it takes a lesser one."""
    search_limit_ms: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """The longest that a batch is searched; most of the measured time of a step if not given."""
    worker_memory_gib: Annotated[float, Field(ge=0.5, le=2**20)] = 4.0
    """The most that a planner process may hold; with less than half a GiB it cannot start."""


class DataForm(Form):
    """What the data sets of all families have in common."""

    used_tokens: ClassVar[frozenset[str]] = frozenset({"pad", "bos", "eos"})
    """Special tokens that the family writes."""

    path: Path
    """JSON list of samples."""
    tokenizer: Path
    """A tokenizer file of the ``tokenizers`` library."""
    tokens: TokensForm | None = None
    """What it calls its special tokens; those of this package's own where not given."""
    cache_folder: Path | None = None
    """Where the index of the data set is kept; beside the data where not given."""
    skip_bad_samples: bool = False
    """Go on without samples that cannot be used, and count them; also --skip-bad-samples."""
    valid_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the samples that is kept for validation."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        stated = self.tokens.model_fields_set if self.tokens is not None else frozenset[str]()
        unread = sorted(stated - self.used_tokens)
        if unread:
            raise ValueError(
                f"tokens.{unread[0]} is not written by this family (expected only "
                f"{', '.join(sorted(self.used_tokens))})"
            )
        return self

    @property
    def needed_tokens(self) -> frozenset[str]:
        """Special tokens that the tokenizer must have, unless the configuration says null."""
        return frozenset({"bos", "eos"})

    def _special_tokens(self) -> SpecialTokens:
        return (self.tokens or TokensForm()).special_tokens(self.needed_tokens)

    def text_form(self) -> TextForm:
        """How texts are written for the tokenizer.

        Raises:
            ConfigError: A file that it names cannot be used.
        """
        if self.tokens is None:
            return OUR_TEXT_FORM
        return TextForm(tokens=self._special_tokens())

    def implied_files(self) -> Mapping[str, Path]:
        """Files that are read although no key names them, by what they are."""
        return {}


class DipConfig(Form, ABC):
    """A whole configuration file; every family of models has a subclass with its own forms.

    A subclass declares ``family`` (a literal, its name), ``model`` and a narrower ``data``.
    """

    schedule: ScheduleConfig
    planning: PlanningConfig = PlanningConfig()
    data: DataForm

    @abstractmethod
    def model_shape(self) -> "ModelShape":
        """The modules with all that their cost depends on; the one with the loss is the last."""

    @abstractmethod
    def megatron_arguments(self) -> MegatronArguments:
        """Megatron's arguments that the configuration states, by their names in ``args``.

        Those who write the model in YAML need not repeat it on the command line.
        """

    @abstractmethod
    def module_forms(self) -> "Mapping[str, TransformerForm]":
        """What the configuration says of every module, by its name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shape = self.model_shape()
        if not any(module.trains_any for module in shape.modules):
            names = [module.name for module in shape.modules]
            raise ValueError(
                f"model: nothing is trained, {' and '.join(names)} are frozen (expected something "
                f"to train: say which parts under model.{names[-1]}.trainable)"
            )
        named, expected = set(self.schedule.modules), set(self.num_layers())
        if self.schedule.partition is None:
            if named != expected:
                raise ValueError(
                    f"schedule.modules names {sorted(named)} (expected {sorted(expected)}: one "
                    f"entry per module of the model, or a file under schedule.partition)"
                )
            build_partition(self)
            return self
        if not named <= expected:
            raise ValueError(
                f"schedule.modules names {sorted(named)} (expected some of {sorted(expected)})"
            )
        for name, module in self.schedule.modules.items():
            stated = sorted(_CUT_FIELDS & module.model_fields_set)
            if stated:
                raise ValueError(
                    f"schedule.modules.{name} states {stated} beside schedule.partition (expected "
                    f"the cut in one place: remove one of them)"
                )
        return self

    def num_layers(self) -> Mapping[str, int]:
        """Layers per module, upstream modules first."""
        return {module.name: module.num_layers for module in self.model_shape().modules}


def build_partition(config: DipConfig) -> Partition:
    """The partition that ``config.schedule`` describes or names.

    Raises:
        PartitionError: Layer counts do not fit the module or the number of ranks, or a rank has no
            stage.
        ConfigError: Segments and layers of a module contradict one another.
    """
    schedule, num_layers = config.schedule, config.num_layers()
    if schedule.partition is not None:
        loaded = load_partition(schedule.partition)
        loaded.check_layers(num_layers, schedule.num_ranks)
        loaded.check_ranks(schedule.num_ranks)
        return loaded
    layers, sizes = {}, {}
    for name, count in num_layers.items():
        module = schedule.modules[name]
        cut = module.layers or cut_evenly(count, module.num_segments, schedule.num_ranks)
        total = sum(sum(segment) for segment in cut)
        if total != count or len(cut) != module.num_segments:
            raise ConfigError(
                f"schedule.modules.{name}.layers: {len(cut)} segments with {total} layers "
                f"(expected num_segments {module.num_segments} with {count} layers)"
            )
        layers[name] = cut
        if module.sub_microbatch_tokens is not None:
            sizes[name] = module.sub_microbatch_tokens
    made = partition_from_layers(layers, schedule.num_ranks)
    made.check_ranks(schedule.num_ranks)
    return made.model_copy(update={"sub_microbatch_tokens": sizes})
