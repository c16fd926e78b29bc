"""What a family of models is made of: its configuration, its stages, its data sets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.costs import Boundary, ItemSizes, Parallelism, shape_boundary
from megatron_dip.families.forms import FamilyConfig, TransformerForm
from megatron_dip.families.packed.batches import Microbatch, StageData
from megatron_dip.families.packed.initialization import initialize_parameters
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.packed.parts import choose_trained_parts, set_learning_rate_factors
from megatron_dip.families.packed.stage import StageLayers, StageModule, row_multiple

__all__ = ["ModelFamily", "SampleSet", "SetLengths", "StageFactory"]


@dataclass(frozen=True, kw_only=True)
class SetLengths:
    """How many samples a run reads of each set: 0 where it needs none, None for one epoch."""

    train: int | None
    valid: int | None

    @property
    def needs_train(self) -> bool:
        return self.train != 0

    @property
    def needs_valid(self) -> bool:
        return self.valid != 0


class StageFactory(ABC):
    """Builds stages of a model, with initial weights that do not depend on the cut.

    Args:
        config: The run's configuration.
        seed: Of the initial weights.
    """

    model_type: type[PackedModel] = PackedModel
    """The class of the model; what of it a rank holds differs with the schedule."""

    def __init__(self, config: FamilyConfig, seed: int) -> None:
        self.shape = config.model_shape()
        self.forms: Mapping[str, TransformerForm] = config.module_forms()
        self._seed = seed

    @property
    @abstractmethod
    def loss_config(self) -> TransformerConfig:
        """The configuration of the module with the loss, which Megatron's training loop reads."""

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Between stages of ``module``, or (outer) from its last stage to those that read it."""
        parallel = Parallelism(
            tensor=mpu.get_tensor_model_parallel_world_size(),
            context=mpu.get_context_parallel_world_size(),
            sequence_parallel=self.loss_config.sequence_parallel,
        )
        return shape_boundary(
            self.shape.module(module),
            parallel,
            outer=outer,
            row_multiple=row_multiple(self.loss_config),
        )

    @abstractmethod
    def construct(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """A stage as Megatron's layers come up."""

    def build(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """A stage with its initial weights; what of it is trained is said, and how fast."""
        stage = self.construct(module, **layers)
        initialize_parameters(stage, self._seed)
        self.choose_trained(stage, self.forms[module])
        return stage

    def choose_trained(self, stage: StageModule, form: TransformerForm) -> None:
        """Say which parameters of ``stage``, of the module of ``form``, are trained."""
        choose_trained_parts(stage, form.trained)
        set_learning_rate_factors(stage, form.learning_rate_factors)


class SampleSet(Protocol):
    """A data set that Megatron's samplers index.

    What a sampler names is a *sequence*; the samples in it are its *members*.  Any members make a
    sequence that can be asked for in the place of a number.
    """

    @property
    def room(self) -> int | None:
        """Most tokens that the members of a sequence have together, as items of the module with the
        loss; None where a sequence has one member."""
        ...

    def members(self, i: int, /) -> tuple[Any, ...]:
        """The members of sequence ``i``: hashable, small, the same on every rank."""
        ...

    def member_sizes(self, member: Any, /) -> ItemSizes:
        """The items of a sequence of this member alone, from what is known beforehand: no image,
        sound or video is read."""
        ...

    @property
    def collate_fn(self) -> Callable[[Sequence[Any]], Microbatch]:
        """Puts the samples of a microbatch together."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: Any, /) -> Any: ...


class ModelFamily[ConfigT: FamilyConfig](ABC):
    """A kind of model with its configuration, stages and data."""

    @abstractmethod
    def stage_factory(self, config: ConfigT, base: TransformerConfig, seed: int) -> StageFactory:
        """What builds the stages; ``base`` is Megatron's configuration of the run."""

    @abstractmethod
    def item_tokens(self, config: ConfigT, module: str) -> range:
        """Tokens that one item of a module can have in training."""

    @abstractmethod
    def measured_data(self, config: ConfigT, module: str, num_tokens: int) -> StageData:
        """One item of a module as its stages read it, of one span and without meaning: what is
        measured of a stage depends on sizes alone."""

    def measured_upstream_tokens(self, config: ConfigT, module: str) -> int:
        """Rows of upstream modules that the item of :meth:`measured_data` reads."""
        return 0

    def smallest_data(self, config: ConfigT) -> dict[str, StageData]:
        """Per module that another one reads, the smallest item of :meth:`measured_data`."""
        return {
            module.name: self.measured_data(
                config, module.name, self.item_tokens(config, module.name).start
            )
            for module in config.model_shape().modules[:-1]
        }

    @abstractmethod
    def data_sets(
        self, config: ConfigT, lengths: SetLengths
    ) -> tuple[SampleSet | None, SampleSet | None]:
        """The samples for training and validation, each where the run needs them.

        A collective call of the whole world.

        Raises:
            DataError: The data set holds samples that cannot be used; see ``--skip-bad-samples``.
        """
