"""Pixels and sounds, decoded once for all tensor-parallel ranks.

Only the first rank of a tensor-parallel group reads and decodes files; the others get what it has
when the first stage of the encoder runs, as tensor-parallel ranks in Megatron's own scripts get
their tokens.  All ranks of a group run the same works in one order, so the call needs no other
agreement, and with NCCL the host waits for nothing.
"""

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor

__all__ = ["decodes_media", "media_of_first_rank"]


def decodes_media() -> bool:
    """Whether this rank decodes what encoders read: it holds their first stages, and is the first
    of its tensor-parallel group."""
    return bool(
        mpu.get_pipeline_model_parallel_rank() == 0 and mpu.get_tensor_model_parallel_rank() == 0
    )


def media_of_first_rank(
    own: Tensor | None, shape: Sequence[int], like: Tensor, group: dist.ProcessGroup, what: str
) -> Tensor:
    """What the first rank of ``group`` has decoded; a collective call where there are several.

    Args:
        own: What this rank has; only the first one's counts.
        shape: As all ranks know it from the sizes of the items.
        like: A weight, with the type and the device of the result.
        group: The tensor-parallel ranks.
        what: Names the values in errors.

    Raises:
        ValueError: The first rank has none, or of another shape.
    """
    if group.rank() == 0:
        if own is None or own.shape != tuple(shape):
            given = "none" if own is None else list(own.shape)
            raise ValueError(
                f"the first stage needs {what} {list(shape)}, but the batch has {given}"
            )
        values = own.to(like.dtype)
    else:
        values = like.new_empty(tuple(shape))
    if group.size() > 1 and values.numel():
        values = values.contiguous()
        dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
    return values
