"""Row counts at stage boundaries: rules over token counts that sender and receiver both apply.

Notation: N patches or T tokens of a sub-microbatch, H the hidden size of the module, H_l that of
the language module.  ``num_shards`` is the tensor-parallel size where the module runs with
sequence parallelism, and 1 where it does not.

====================  ===========================================  =========================
boundary              shape                                        on tensor-parallel ranks
====================  ===========================================  =========================
vision, inner         ``[padded_rows(N) / num_shards, 1, H]``      different rows, or equal
vision, output        ``[N / 4, 1, H_l]``                          equal
language, inner       ``[padded_rows(T) / num_shards, 1, H]``      different rows, or equal
language, output      ``[T]`` losses                               equal
====================  ===========================================  =========================
"""

__all__ = ["PATCHES_PER_TOKEN", "padded_rows"]

PATCHES_PER_TOKEN = 4
"""Patches that the 2x2 merge joins into one row of image features."""


def padded_rows(num_tokens: int, num_shards: int) -> int:
    """``num_tokens`` rounded up to a multiple of ``num_shards``."""
    return -(-num_tokens // num_shards) * num_shards
