"""Row counts at stage boundaries: rules over token counts that sender and receiver both apply.

Notation: N patches or T tokens of a sub-microbatch, H the hidden size of the module, H_l that of
the language module; m the merge size of images; M tokens of text that C clips read.
``num_shards`` is the tensor-parallel size where the module runs with sequence parallelism, and 1
where it does not, times what 8-bit kernels want a rank's rows to be a multiple of
(``row_multiple``).  Rows that are whole on every rank (M, 7 C, and all outputs) are not filled up.

====================  ===========================================  =========================
boundary              shape                                        on tensor-parallel ranks
====================  ===========================================  =========================
vision, inner         ``[padded_rows(N) / num_shards, 1, H]``      different rows, or equal
vision, output        ``[N / m^2, 1, H_l]``                        equal
audio                 as vision, N being tokens of two log-mel frames and 4 in place of m^2
language, inner       ``[padded_rows(T) / num_shards, 1, H]``      different rows, or equal
language, output      ``[T]`` losses                               equal
text, inner           ``[padded_rows(M) / num_shards, 1, H]``      different rows, or equal
text, output          ``[M, 1, H]``                                equal
dit, inner            ``[padded_rows(N) / num_shards + M + 7 C,    the first part different rows,
                      1, H]``, see ``dit``                         or equal; the others equal
dit, output           ``[N]`` losses                               equal
====================  ===========================================  =========================
"""

__all__ = ["ROWS_PER_CLIP", "padded_rows"]

ROWS_PER_CLIP = 7
"""Rows that a clip adds at the boundaries inside a diffusion transformer: its time and what is made
of it."""


def padded_rows(num_tokens: int, num_shards: int) -> int:
    """``num_tokens`` rounded up to a multiple of ``num_shards``."""
    return -(-num_tokens // num_shards) * num_shards
