"""What a module hands on, from its config: width and sharing among tensor-parallel ranks.

The three forms are those in which Megatron's models take and return hidden states.
"""

from typing import Any

from megatron_dip.costs import Boundary

__all__ = ["batched", "flat", "packed"]


def batched(config: Any, **more: Any) -> Boundary:
    """``[rows per item, items, width]``: items of one length, as in ``GPTModel``.

    Args:
        config: A ``TransformerConfig``.
        more: Other fields of the boundary.
    """
    return Boundary("batched", config.hidden_size, **{"num_shards": num_shards(config), **more})


def packed(config: Any, **more: Any) -> Boundary:
    """``[rows, 1, width]``: items of any length, one after another.  Arguments as of
    :func:`batched`."""
    return Boundary("packed", config.hidden_size, **{"num_shards": num_shards(config), **more})


def flat(config: Any, **more: Any) -> Boundary:
    """``[rows, width]``: items of any length, one after another, whole on every rank.  Arguments
    as of :func:`batched`."""
    return Boundary("flat", config.hidden_size, **more)


def num_shards(config: Any) -> int:
    """Ranks that share the rows of one sequence between layers of ``config``."""
    shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return int(shards * config.context_parallel_size)
