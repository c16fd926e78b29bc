"""Rows that every tensor-parallel rank holds whole, divided for the way between pipeline ranks.

Both directions are exact: what arrives is what was there, bit for bit, and so are the gradients.
The modules that read gathered rows give every rank their whole gradient, so a rank's part of it is
cut out, crosses back, and is gathered by the sender's own backward.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_dip.costs import Boundary, ItemSize

__all__ = ["all_rows", "own_rows"]


def own_rows(rows: Tensor, rule: Boundary, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of ``rows``, the same on all ranks of ``group``.

    Args:
        rows: ``[rows, ...]``; padded with zeros to fit.
        rule: Of the boundary; one that does not gather leaves ``rows`` as they are.
        group: The ranks that share them.
    """
    if not rule.is_gathered:
        return rows
    missing = -rows.shape[0] % rule.num_shards
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    part: Tensor = scatter_to_sequence_parallel_region(rows, group=group)
    return part


def all_rows(
    part: Tensor, rule: Boundary, sizes: Sequence[ItemSize], group: dist.ProcessGroup
) -> Tensor:
    """The inverse of :func:`own_rows`.

    Args:
        part: What this rank has got.
        rule: As of :func:`own_rows`.
        sizes: Of the items of the message.
        group: As of :func:`own_rows`.
    """
    if not rule.is_gathered:
        return part
    whole: Tensor = gather_from_sequence_parallel_region(
        part, tensor_parallel_output_grad=False, group=group
    )
    return whole[: rule.num_rows(sizes, outer=True)]
