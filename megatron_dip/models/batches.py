"""Parts of raw batches, and messages put together in the order of their items."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_dip.costs import ItemSize
from megatron_dip.errors import DataError, UnsupportedError
from megatron_dip.models.staged import Received
from megatron_dip.runtime.host_copies import to_device

__all__ = [
    "items_in_places",
    "join",
    "needed",
    "num_samples",
    "pick",
    "take",
    "take_rows",
    "take_samples",
]


def num_samples(batch: Mapping[str, Any]) -> int:
    """First dimension of the tensors of a raw batch.

    Raises:
        UnsupportedError: They differ, or there are none: the batch has no plain form.
    """
    counts = {
        name: value.shape[0]
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    }
    if len(set(counts.values())) != 1:
        raise UnsupportedError(
            f"the tensors of a batch have first dimensions {counts} (expected the number of "
            "samples in all of them: the model's class must say how its batches are divided)"
        )
    return next(iter(counts.values()))


def take(batch: Any, items: Sequence[int]) -> Any:
    """A new dict whose tensors are those of ``batch`` at ``items`` of their first dimension.

    All items in order: the tensors themselves, so that a batch of any form can be handed on whole.

    Raises:
        UnsupportedError: ``batch`` is no dict, or its tensors are not one row per item.
    """
    if not isinstance(batch, Mapping):
        raise UnsupportedError(
            f"the data iterator yields {type(batch).__name__} (expected a dict of tensors: the "
            "model's class must say how its batches are divided)"
        )
    first = next((value for value in batch.values() if isinstance(value, torch.Tensor)), None)
    if first is not None and first.dim() and tuple(items) == tuple(range(first.shape[0])):
        return dict(batch)
    num_samples(batch)
    return {
        name: take_rows(value, items)
        if isinstance(value, torch.Tensor) and value.dim() > 0
        else value
        for name, value in batch.items()
    }


def take_rows(tensor: torch.Tensor, rows: Sequence[int], dim: int = 0) -> torch.Tensor:
    """``tensor`` at ``rows`` of dimension ``dim``: a view where they follow each other."""
    if not rows:
        return tensor.narrow(dim, 0, 0)
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor.narrow(dim, rows[0], len(rows))
    return tensor.index_select(dim, to_device(torch.tensor(rows), tensor.device))


def take_samples(
    batch: Mapping[str, Any], names: Sequence[str], items: Sequence[int], num_samples: int
) -> dict[str, torch.Tensor]:
    """Those of the tensors ``names`` that a batch has, at ``items``.

    Args:
        batch: A raw batch.
        names: Of tensors [samples, ...], or [axes, samples, tokens] of positions with several axes.
            One of another size belongs to all samples and is left out.
        items: Samples.
        num_samples: Of the whole batch.
    """
    taken = {}
    for name in names:
        tensor = batch.get(name)
        if isinstance(tensor, torch.Tensor):
            dim = 1 if name == "position_ids" and tensor.dim() == 3 else 0
            if tensor.shape[dim] == num_samples:
                taken[name] = take_rows(tensor, items, dim)
    return taken


def items_in_places(
    module: str, rows: Sequence[int], places: Sequence[int]
) -> list[tuple[int, ...]]:
    """The items that fill the places of each sample, in their order.

    Args:
        module: Whose items they are.
        rows: Of each item.
        places: Of each sample: tokens that rows replace.

    Raises:
        DataError: An item is left over, is missing, or lies in two samples.
    """
    found: list[tuple[int, ...]] = []
    item = 0
    for number, wanted in enumerate(places):
        first, filled = item, 0
        while filled < wanted and item < len(rows):
            filled += rows[item]
            item += 1
        if filled != wanted:
            raise DataError(
                f"module {module}: sample {number} of a microbatch has {wanted} places, and items "
                f"{list(range(first, item))} have {filled} rows (expected as many)"
            )
        found.append(tuple(range(first, item)))
    if item != len(rows):
        raise DataError(
            f"module {module}: {len(rows)} items in a microbatch, and places for the first {item} "
            f"(expected places for all)"
        )
    return found


def pick(received: Received, items: Sequence[int], dim: int) -> Received:
    """``received`` with only ``items``, in this order: a stage may read a part of a message.

    Args:
        received: One message.
        items: Of those in it.
        dim: 1 where items are columns of their own (``batched``), 0 where they have rows.
    """
    if tuple(items) == received.items:
        return received
    at = {item: index for index, item in enumerate(received.items)}
    chosen = [at[item] for item in items]
    sizes = tuple(received.sizes[index] for index in chosen)
    if dim == 1:
        columns = take_rows(received.tensor, chosen, dim=1)
        return received._replace(items=tuple(items), sizes=sizes, tensor=columns)
    starts = [0]
    for size in received.sizes:
        starts.append(starts[-1] + size.num_output_rows)
    rows = [row for index in chosen for row in range(starts[index], starts[index + 1])]
    tensor = take_rows(received.tensor, rows)
    return received._replace(items=tuple(items), sizes=sizes, tensor=tensor)


def needed(received: Received, sizes: Sequence[ItemSize], dim: int) -> Received:
    """``received`` with only what items of ``sizes`` read of it.

    Args:
        received: A message of another module.
        sizes: Items of the stage that has got it.
        dim: As of :func:`pick`.
    """
    module = received.module
    if any(module not in size.needs for size in sizes):
        return received
    wanted = {item for size in sizes for item in size.needs[module]}
    return pick(received, [item for item in received.items if item in wanted], dim)


def join(received: Sequence[Received], dim: int) -> torch.Tensor:
    """The items of all messages in ascending order, one after another along ``dim``.

    Args:
        received: At least one message; all from one module.
        dim: As of :func:`pick`.
    """
    order = sorted(item for one in received for item in one.items)
    if order == [item for one in received for item in one.items]:
        tensors = [one.tensor for one in received]
    else:
        of_item = {item: pick(one, (item,), dim) for one in received for item in one.items}
        tensors = [of_item[item].tensor for item in order]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)
