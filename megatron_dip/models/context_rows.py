"""Which rows of sequences a context-parallel rank has, and the rows of all ranks together.

The order of rows is that of Megatron and Transformer Engine: a sequence is cut into 2c chunks for c
ranks, of which rank r has the r-th and the r-th from the end, so that causal attention is balanced.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dip.errors import DataError
from megatron_dip.runtime.host_copies import to_device

__all__ = ["gather_rows", "rows_of_context_rank"]


def rows_of_context_rank(lengths: Sequence[int], num_ranks: int, rank: int) -> list[int]:
    """The rows that a rank has of sequences of these lengths, laid one behind the other.

    Raises:
        DataError: A length does not divide into two chunks for every rank.
    """
    rows: list[int] = []
    start = 0
    for length in lengths:
        chunk, rest = divmod(length, 2 * num_ranks)
        if rest:
            raise DataError(
                f"a sequence of {length} rows cannot be divided among {num_ranks} context-parallel "
                f"ranks (expected a multiple of {2 * num_ranks}: pad every sequence to one)"
            )
        for at in (rank, 2 * num_ranks - 1 - rank):
            rows.extend(range(start + at * chunk, start + (at + 1) * chunk))
        start += length
    return rows


def gather_rows(tensor: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in the order of their sequences; gradients are summed over the ranks.

    Args:
        tensor: [rows of this rank, ...].
        lengths: Of the sequences, on all ranks together.
        group: The context-parallel ranks.
    """
    num_ranks = group.size()
    gathered = cast(Tensor, _Gather.apply(tensor, group))
    rows = [
        row for rank in range(num_ranks) for row in rows_of_context_rank(lengths, num_ranks, rank)
    ]
    place = torch.empty(len(rows), dtype=torch.int64)
    place[torch.tensor(rows, dtype=torch.int64)] = torch.arange(len(rows))
    return gathered.index_select(0, to_device(place, tensor.device))


class _Gather(torch.autograd.Function):
    """[rows, ...] of every rank, one behind the other."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        # Gloo reduces to all ranks only.
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole, group=context.group)
        own = len(whole) // context.group.size()
        first = own * context.group.rank()
        return whole[first : first + own], None
