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

__all__ = ["PATCHES_PER_TOKEN", "inner_boundary_shape", "padded_rows", "vision_output_shape"]

PATCHES_PER_TOKEN = 4
"""Patches that the 2x2 merge joins into one row of image features."""


def padded_rows(num_tokens: int, num_shards: int) -> int:
    """``num_tokens`` rounded up to a multiple of ``num_shards``."""
    return -(-num_tokens // num_shards) * num_shards


def inner_boundary_shape(
    num_tokens: int, num_shards: int, hidden_size: int
) -> tuple[int, int, int]:
    """Shape of what one stage of a module hands to the next stage of the same module."""
    return (padded_rows(num_tokens, num_shards) // num_shards, 1, hidden_size)


def vision_output_shape(num_patches: int, language_hidden_size: int) -> tuple[int, int, int]:
    """Shape of the image features that the last vision stage hands to the language module."""
    return (num_patches // PATCHES_PER_TOKEN, 1, language_hidden_size)
