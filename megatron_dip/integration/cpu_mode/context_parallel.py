"""Context parallelism on the CPU: what Transformer Engine does, with gloo and Megatron's attention.

Megatron knows one attention whose rows lie on several ranks, that of Transformer Engine, for CUDA
alone.  Here keys and values of all ranks are gathered, and Megatron's own attention reads of them
what the rows of this rank may see.  Limits: no sliding windows, no cross-attention, no masks of a
script's own.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dip.errors import DataError, UnsupportedError
from megatron_dip.models.context_rows import gather_rows, rows_of_context_rank

__all__ = ["divide_rows_among_context_ranks"]


def divide_rows_among_context_ranks() -> None:
    """Patch attention, and the function of Transformer Engine that says which rows a rank has."""
    from megatron.core import utils

    if getattr(utils, "tex", None) is None:
        utils.tex = SimpleNamespace(thd_get_partitioned_indices=_partitioned_indices)
    _attend_to_rows_of_all_ranks()


def _partitioned_indices(starts: Tensor, num_rows: int, num_ranks: int, rank: int) -> Tensor:
    """As ``thd_get_partitioned_indices`` of Transformer Engine."""
    lengths = starts.diff().tolist()
    if sum(lengths) != num_rows:
        raise DataError(
            f"packed sequences of {lengths} rows in a sample of {num_rows} (expected all rows to "
            f"belong to a sequence)"
        )
    return torch.tensor(rows_of_context_rank(lengths, num_ranks, rank), dtype=torch.int64)


def _attend_to_rows_of_all_ranks() -> None:
    from megatron.core import mpu
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init, forward = DotProductAttention.__init__, DotProductAttention.forward

    @functools.wraps(init)
    def init_on_one_rank(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        num_ranks = config.context_parallel_size
        if num_ranks == 1:
            init(self, config, *args, **kwargs)
            self.context_group = None
            return
        if config.window_size is not None:
            raise UnsupportedError(
                f"--context-parallel-size {num_ranks} with --window-size does not work on the CPU "
                f"(--cpu): leave out one of the two"
            )
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        init(self, alone, *args, **kwargs)
        self.config = config
        self.context_group = mpu.get_context_parallel_group()

    @functools.wraps(forward)
    def forward_on_context_ranks(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if self.context_group is None:
            masking = (attention_mask, attn_mask_type, attention_bias, packed_seq_params)
            output: Tensor = forward(self, query, key, value, *masking)
            return output
        if self.attention_type != "self":
            raise UnsupportedError(
                "--context-parallel-size above 1 divides the rows of self-attention only on the "
                "CPU (--cpu): use 1 for models with cross-attention"
            )
        is_causal = _is_causal(attn_mask_type or self.attn_mask_type)
        lengths = _sequence_lengths(packed_seq_params)
        if lengths is None:
            lengths = [len(query) * self.context_group.size()]
        is_packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        parts = [part.unsqueeze(1) if is_packed else part for part in (query, key, value)]
        rows = _Rows(lengths, self.context_group, is_causal)
        found = _attend(functools.partial(forward, self), parts, rows)
        if not is_packed:
            return found
        # After the last sequence what belongs to none.
        rest = found.new_zeros(len(query) - len(found), *found.shape[1:])
        return torch.cat([found, rest]).squeeze(1)

    DotProductAttention.__init__ = init_on_one_rank
    DotProductAttention.forward = forward_on_context_ranks


class _Rows(NamedTuple):
    """The sequences of a call."""

    lengths: Sequence[int]
    """On all ranks together."""
    group: dist.ProcessGroup
    is_causal: bool
    """Whether a row sees what is before it alone."""


def _attend(attend: Callable[..., Tensor], parts: Sequence[Tensor], rows: _Rows) -> Tensor:
    """Rows of this rank against the rows of all, sequence by sequence.

    Args:
        attend: Megatron's attention on one rank.
        parts: Queries, keys and values, each [rows, samples, heads, width].

    Returns:
        [rows of the sequences, samples, heads x width].
    """
    query, key, value = parts
    num_ranks, rank = rows.group.size(), rows.group.rank()
    used = sum(rows.lengths) // num_ranks
    # In one message, so that gradients come back in one order on all ranks.
    both = gather_rows(torch.cat([key[:used], value[:used]], dim=-1), rows.lengths, rows.group)
    keys, values = both.split([key.shape[-1], value.shape[-1]], dim=-1)
    outputs = []
    start = 0
    for length in rows.lengths:
        if not length:
            continue
        places = torch.tensor(rows_of_context_rank([length], num_ranks, rank))
        mask = torch.arange(length)[None, :] > places[:, None] if rows.is_causal else None
        own = slice(start // num_ranks, (start + length) // num_ranks)
        whole = slice(start, start + length)
        one = (query[own], keys[whole].contiguous(), values[whole].contiguous())
        outputs.append(attend(*one, mask))
        start += length
    return torch.cat(outputs)


def _is_causal(kind: Any) -> bool:
    from megatron.core.transformer.enums import AttnMaskType

    if kind in (AttnMaskType.causal, AttnMaskType.padding_causal):
        return True
    if kind == AttnMaskType.no_mask:
        return False
    raise UnsupportedError(
        f"attention masks of kind {kind.name} with --context-parallel-size above 1 do not work on "
        f"the CPU (--cpu): use causal attention, attention without a mask, or one rank"
    )


def _sequence_lengths(packed_seq_params: Any) -> list[int] | None:
    """Of packed sequences, padding behind them included."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    starts = packed_seq_params.cu_seqlens_q_padded
    if starts is None:
        starts = packed_seq_params.cu_seqlens_q
    return [end - start for start, end in pairwise(starts.tolist())]
