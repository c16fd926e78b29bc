"""How one class of model runs in stages: the protocol through which every model enters.

A model is cut in the constructor of its class: every script, provider, builder and bridge ends
there, with all configurations in its hands.  A :class:`StagedModel` says of one class what its
modules are, how its constructor is asked for one stage, what a raw batch holds and what crosses
the boundaries.  Everything else (schedules, plans, transfers, agreement, losses) is the same for
all models.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
from megatron_dip.errors import UnsupportedError
from megatron_dip.partition import Partition, Stage

__all__ = ["Part", "Received", "RunFacts", "StagedModel"]


class Part(NamedTuple):
    """The layers of one stage."""

    module: str
    first_layer: int
    num_layers: int
    first: bool
    """Whether it carries what sits before the module's first layer."""
    last: bool
    """Whether it carries what sits after the module's last layer."""

    @classmethod
    def of(cls, partition: Partition, stage: Stage) -> Self:
        """What ``stage`` of ``partition`` holds."""
        return cls(
            module=stage.module,
            first_layer=stage.first_layer,
            num_layers=stage.num_layers,
            first=partition.first_stage(stage.module) == stage,
            last=partition.last_stage(stage.module) == stage,
        )

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


class Received(NamedTuple):
    """One message that has arrived."""

    module: str
    items: tuple[int, ...]
    sizes: tuple[ItemSize, ...]
    """Of ``items``."""
    tensor: torch.Tensor
    """As its :class:`Boundary` says, items one after another in the order of ``items``."""


class RunFacts(NamedTuple):
    """What a launch says that a model's arguments may not."""

    num_pipeline_ranks: int
    num_tensor_ranks: int
    num_context_ranks: int


class StagedModel(ABC):
    """How one class of model runs in stages.

    Made once per run.

    Args:
        arguments: Of the model's constructor, by name, defaults included, as the script gave them.
        run: Facts of the launch.
    """

    model_types: ClassVar[tuple[type[torch.nn.Module] | str, ...]] = ()
    """Set by ``register``."""
    assigns_samples: ClassVar[bool] = False
    """Whether the data of the class follow ``schedule.assignment`` by themselves."""
    divides_rows: ClassVar[bool] = False
    """Whether the class and its scripts divide the rows of a sample among context-parallel ranks;
    boundaries then are those of one rank, and items of all."""

    def __init__(self, arguments: Mapping[str, Any], run: RunFacts) -> None:
        self.arguments = arguments
        self.run = run

    @abstractmethod
    def modules(self) -> tuple[ModuleShape, ...]:
        """The module graph, upstream modules first, the one with the loss last.

        Raises:
            UnsupportedError: The model cannot be cut as it is configured; says why.
        """

    @abstractmethod
    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """Arguments of the constructor that differ in this stage: configurations cut by
        ``cut_config``, ``pre_process`` and the like."""

    def constructing(self, part: Part) -> AbstractContextManager[None]:
        """Around the constructor of a stage."""
        return nullcontext()

    def finish(self, model: torch.nn.Module, part: Part) -> None:  # noqa: B027
        """Change a stage that was constructed: drop what is not its own, enter and leave blocks."""

    @abstractmethod
    def items(self, batch: Any) -> ItemSizes:
        """Sizes of all items of a raw batch (what the script's iterator yields), per module.

        Reads shapes and tensors on the host only.
        """

    def part_of(self, batch: Any, part: Part, items: Sequence[int]) -> Any:
        """What the script's iterator yields for these items in this stage: always a new object.

        Here: a dict whose tensors are taken at ``items`` of their first dimension.
        """
        from megatron_dip.models.batches import take

        return take(batch, items)

    def to_device(self, data: Any, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
        """``data`` of :meth:`part_of` for the script, called ahead of the forward that reads them.

        Here: in page-locked memory of the host, because it is the script that moves its batches.

        Returns:
            The data, and those of their tensors that are on ``device``.
        """
        if device.type != "cuda":
            return data, []
        moved = tree_map_only(torch.Tensor, _page_locked, data)
        tensors = [one for one in tree_leaves(moved) if isinstance(one, torch.Tensor)]
        # A script's iterator may yield them there, and parts of them are then made there.
        return moved, [one for one in tensors if one.device.type == "cuda"]

    @abstractmethod
    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Between stages of ``module``, or (outer) from its last stage to the modules that read
        it."""

    def inputs(self, part: Part, received: Sequence[Received]) -> list[torch.Tensor | None]:
        """What the model's own ``set_input_tensor`` takes: the one tensor that has arrived, or
        [None] in a first stage without upstream modules."""
        if not received:
            return [None]
        (one,) = received
        return [one.tensor]

    def calling(self, part: Part, sizes: Sequence[ItemSize]) -> AbstractContextManager[None]:
        """Around the script's forward step of a stage, for items of these sizes."""
        return nullcontext()

    def single_samples(self, batch: Any) -> list[Any]:
        """Raw batches of one sample each, which :meth:`join_samples` puts together in any order.

        Raises:
            UnsupportedError: The samples of this class cannot be told apart, or there is no use in
                it; says why.
        """
        raise UnsupportedError(
            f"{type(self).__name__} does not say how samples of its batches are told apart (leave "
            f"schedule.assignment out, or give the class single_samples and join_samples)"
        )

    def join_samples(self, samples: Sequence[Any]) -> Any:
        """The raw batch of these ``samples``, at least one, of :meth:`single_samples`.

        Raises:
            UnsupportedError: The class tells samples apart, and does not say how to join them.
        """
        raise UnsupportedError(
            f"{type(self).__name__} has single_samples and no join_samples (give the class both, "
            f"or leave schedule.assignment out)"
        )

    def check_split(self, module: str) -> None:  # noqa: B027
        """
        Raises:
            UnsupportedError: Microbatches of ``module`` cannot be split; says why.
        """


def _page_locked(tensor: torch.Tensor) -> torch.Tensor:
    is_of_host = tensor.device.type == "cpu"
    return tensor.pin_memory() if is_of_host and not tensor.is_pinned() else tensor
