"""How the models of this folder run in stages: their class for the front door.

A script of ``examples/`` names this module to ``--dip-schedule``, see ``arguments``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.training import get_args

from megatron_dip.costs import Boundary, ItemSizes, ModuleShape
from megatron_dip.errors import DataError
from megatron_dip.families.accounting import note_microbatch
from megatron_dip.families.base import StageFactory
from megatron_dip.families.packed.batches import Microbatch
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.models.batches import join
from megatron_dip.models.registry import register
from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel

__all__ = ["StagedPacked"]


@register(PackedModel)
class StagedPacked(StagedModel):
    """Stages of a :class:`PackedModel`; its microbatches know their sizes and parts.

    Which families divide rows, the check of flags says.
    """

    assigns_samples = True
    divides_rows = True

    def __init__(self, arguments: Mapping[str, Any], run: RunFacts) -> None:
        super().__init__(arguments, run)
        self._stages: StageFactory = arguments["stages"]
        self._chunks: list[torch.nn.Module] = []

    def modules(self) -> tuple[ModuleShape, ...]:
        """As the configuration describes them."""
        return self._stages.shape.modules

    def stage_arguments(self, part: Part) -> dict[str, Any]:
        """The part alone."""
        return {"part": part}

    def finish(self, model: torch.nn.Module, part: Part) -> None:
        """Remember the chunk, by which training is known from evaluation."""
        self._chunks.append(model)

    def items(self, batch: Any) -> ItemSizes:
        """
        Raises:
            DataError: ``batch`` is no microbatch of these models.
        """
        return _microbatch(batch).item_sizes

    def part_of(self, batch: Any, part: Part, items: Sequence[int]) -> Any:
        """The data of these items, with the numbers of what they read; between the ends of a module
        without what would only be moved to the device and not be read."""
        microbatch = _microbatch(batch)
        # Gradients are off in training, too, where nothing of a stage is trained.
        if self._chunks[0].training:
            note_microbatch(microbatch)
        reads_media = part.first or part.last
        return (microbatch if reads_media else microbatch.without_media).sub_batch(
            part.module, items
        )

    def to_device(self, data: Any, device: torch.device) -> tuple[Any, list[torch.Tensor]]:
        """All of it, as ``get_batch`` would move it."""
        moved = data.to(device, weights_dtype=get_args().params_dtype)
        return moved, list(moved.tensors())

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """Packed rows."""
        return self._stages.boundary(module, outer=outer)

    def inputs(self, part: Part, received: Sequence[Received]) -> list[torch.Tensor | None]:
        """Hidden states, or what is read of upstream modules, see ``set_input_tensor``."""
        upstream = self._stages.shape.module(part.module).upstream
        if not part.first or not upstream:
            return super().inputs(part, received)
        found = [
            join(messages, dim=0)
            for name in upstream
            if (messages := [one for one in received if one.module == name])
        ]
        return [torch.cat(found) if len(found) > 1 else found[0] if found else None]


def _microbatch(batch: Any) -> Microbatch:
    if not isinstance(batch, Microbatch):
        raise DataError(
            f"the data iterator yielded {type(batch).__name__} (expected a microbatch: use "
            f"megatron_dip.families.iterators.data_sets)"
        )
    return batch
