"""What the microbatches of all model families offer: to planning, to stages, to the loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch

from megatron_dip.costs import ItemSizes
from megatron_dip.runtime.host_copies import to_device

__all__ = ["EncoderBatch", "Microbatch", "Movable", "StageData", "check_items"]


def check_items(module: str, items: Sequence[int], counts: Mapping[str, int]) -> None:
    """Check the items asked of a microbatch against ``counts``, which it has of each module.

    Raises:
        ValueError: No such module, or an item number that the microbatch does not have.
    """
    if module not in counts:
        expected = " or ".join(map(repr, counts))
        raise ValueError(f"unknown module {module!r}; expected {expected}")
    wrong = [item for item in items if not 0 <= item < counts[module]]
    if wrong:
        raise ValueError(
            f"no {module} item {wrong[0]}: the microbatch has {counts[module]} of them"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Movable:
    """Base of data classes that hold tensors, or others like themselves."""

    in_weights_dtype: ClassVar[frozenset[str]] = frozenset()
    """Fields that a stage turns into the type of its weights before all else."""

    def to(self, device: torch.device | str, weights_dtype: torch.dtype | None = None) -> Self:
        """The same on another device.

        Args:
            device: The target.
            weights_dtype: Of the stages that read it; what they turn into it travels so.
        """
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                dtype = weights_dtype if field.name in self.in_weights_dtype else None
                moved[field.name] = to_device(value, device, dtype)
            elif isinstance(value, Movable):
                moved[field.name] = value.to(device, weights_dtype)
        return replace(self, **moved)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it holds."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, Movable):
                yield from value.tensors()


class EncoderBatch(Movable):
    """Base of the data of encoders: nothing is upstream of them."""

    @property
    def upstream_items(self) -> tuple[tuple[str, int], ...]:
        """None."""
        return ()

    @property
    def upstream_rows(self) -> tuple[int, ...]:
        """None, as there are no items."""
        return ()


class StageData(Protocol):
    """The data of some items of one module: what its stages read beside their input."""

    @property
    def items(self) -> tuple[int, ...]:
        """The numbers of the items, in the order of their rows."""
        ...

    @property
    def upstream_items(self) -> tuple[tuple[str, int], ...]:
        """The items of upstream modules that these read: module and number, in the order in which
        the module's first stage takes their rows."""
        ...

    @property
    def upstream_rows(self) -> tuple[int, ...]:
        """Rows that each of ``upstream_items`` has where it is read."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        ...


class Microbatch(ABC):
    """One microbatch: items of every module, numbered from 0 within their module."""

    @abstractmethod
    def metadata(self) -> ItemSizes:
        """What planning needs to know; plain numbers, the same on all ranks."""

    @cached_property
    def item_sizes(self) -> ItemSizes:
        """The metadata; always the same object, also in a copy: that is how a batch is known."""
        return self.metadata()

    @abstractmethod
    def sub_batch(self, module: str, items: Sequence[int]) -> Any:
        """The :class:`StageData` of the given items of a module, in the given order.

        Raises:
            ValueError: No such module, or an item number that the microbatch does not have.
        """

    @cached_property
    @abstractmethod
    def without_media(self) -> Self:
        """The same without what only the ends of a module read: pixels, sounds, latents."""

    @abstractmethod
    def whole(self, seq_length: int) -> Any:
        """All of it, for a schedule with fixed shapes of ``seq_length`` rows per sample: something
        that the whole model of the family reads, with ``to(device)`` and ``loss_mask``."""
