"""Attention inside the spans of packed rows.

``SpanSelfAttention`` rotates rows without asking the device for the lengths of spans;
``SpanAttention`` is the core of attention where there is no Transformer Engine.

Notation: T packed tokens of this rank's heads, a query heads, g key and value heads (query
groups), d channels per head.  Context-parallel ranks gather keys and values of all rows.  Limits of
the core: no sliding window, no attention bias, no softmax offset, no cross-attention of divided
rows; those are refused at construction.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.context_rows import gather_rows, rows_of_context_rank
from megatron_dip.runtime.host_copies import to_device

__all__ = ["SpanAttention", "SpanParams", "SpanSelfAttention", "span_params"]

_CAUSAL = frozenset({AttnMaskType.causal, AttnMaskType.padding_causal})
_FULL = frozenset({AttnMaskType.no_mask, AttnMaskType.padding})


@dataclass
class SpanParams(PackedSeqParams):
    """Megatron's description of packed rows, with the span lengths as plain numbers as well.

    Reading lengths back from ``cu_seqlens`` would stop the host at every layer on a GPU.
    """

    span_lengths: tuple[int, ...] = ()
    context_lengths: tuple[int, ...] = ()
    """Rows that each span reads in cross-attention; in self-attention a span reads itself."""
    rotary_places: Tensor | slice | None = None
    """What takes from a rotary table ``[places, 1, 1, d]`` a row for every row; None where they
    are rotated as Megatron does."""


def span_params(
    span_lengths: Sequence[int],
    *,
    num_rows: int,
    device: torch.device | str,
    context_lengths: Sequence[int] | None = None,
    is_divided: bool = False,
    has_places: bool = False,
) -> SpanParams:
    """Describe ``num_rows`` rows: the given spans, and one more where rows are left over.

    ``context_lengths`` are for cross-attention: the rows of another tensor that each span reads;
    the rows left over read none.  ``is_divided``: the rows are those of all context-parallel ranks,
    among which every span divides.  ``has_places``: rotary tables are by place in a span, and rows
    are not rotated by a fused kernel.

    Raises:
        ValueError: The spans have more rows than ``num_rows``.
    """
    missing = num_rows - sum(span_lengths)
    if missing < 0:
        raise ValueError(f"{sum(span_lengths)} rows in spans, but only {num_rows} rows in all")
    lengths = (*span_lengths, missing) if missing else tuple(span_lengths)
    contexts = lengths
    if context_lengths is not None:
        assert len(context_lengths) == len(span_lengths)
        contexts = (*context_lengths, 0) if missing else tuple(context_lengths)
    cumulative = _cumulative(lengths, device)
    return SpanParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative if contexts is lengths else _cumulative(contexts, device),
        # Transformer Engine divides by these; there are no other rows between the spans.
        cu_seqlens_q_padded=cumulative if is_divided else None,
        cu_seqlens_kv_padded=cumulative if is_divided else None,
        max_seqlen_q=max(lengths, default=0),
        max_seqlen_kv=max(contexts, default=0),
        span_lengths=lengths,
        context_lengths=contexts,
        rotary_places=_places(lengths, device) if has_places else None,
    )


def _cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    ends = list(accumulate(lengths, initial=0))
    return to_device(torch.tensor(ends, dtype=torch.int32), device)


def _places(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """``[rows]`` int64: the place of every row in its span."""
    places = [torch.arange(length) for length in lengths]
    return to_device(torch.cat([torch.arange(0), *places]), device)


class SpanSelfAttention(SelfAttention):
    """Megatron's self-attention.

    Without a fused kernel Megatron rotates packed rows span by span and reads the lengths of spans
    back from the device, several times in every layer.  Here a table with a row for every row
    rotates them at once, where the description of the rows says how to take it.
    """

    _rotary: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``SelfAttention.forward``."""
        places = getattr(packed_seq_params, "rotary_places", None)
        # Encoders have all rows on every context-parallel rank.
        is_whole = self.config.context_parallel_size == 1
        if rotary_pos_emb is not None and places is not None and is_whole:
            self._rotary, rotary_pos_emb = rotary_pos_emb[places], None
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
            return output
        finally:
            self._rotary = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As ``SelfAttention``'s, queries and keys ``[T, 1, heads, d]`` rotated."""
        made = super().get_query_key_value_tensors(*args, **kwargs)
        if self._rotary is None:
            return made
        query, key, *rest = made
        query, key = (
            apply_rotary_pos_emb(
                rows,
                self._rotary,
                config=self.config,
                # Megatron 0.19 keeps it on the layer; the function is in all versions.
                mscale=_yarn_get_concentration_factor_from_config(self.config),
                cp_group=self.pg_collection.cp,
            )
            for rows in (query, key)
        )
        return query, key, *rest


class SpanAttention(MegatronModule):
    """A core attention module of Megatron for packed (``thd``) rows.

    Heads are those of this tensor-parallel rank; key and value heads may be fewer than query
    heads.  Neighbouring spans of equal length share one call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.context_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            self.context_group = (
                mpu.get_context_parallel_group() if pg_collection is None else pg_collection.cp
            )
        _refuse_what_is_not_supported(config, attention_type)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= max(1, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend inside spans: ``[T, a, d]``, ``[T, g, d]``, ``[T, g, d]`` to ``[T, a * d]``.

        In cross-attention keys and values have rows of their own, and a span may read none: its
        output is zero.
        """
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            raise UnsupportedError(
                "SpanAttention takes packed rows (packed_seq_params) and neither an attention "
                "mask nor a bias; use transformer_impl='transformer_engine' for those"
            )
        is_causal = _is_causal(attn_mask_type or self.attn_mask_type)
        dropout = self.dropout if self.training else 0.0
        if self.context_group is not None:
            return self._attend_to_all_ranks(
                query, key, value, packed_seq_params, is_causal=is_causal, dropout=dropout
            )
        outputs = [query.new_empty(0, query.shape[1] * query.shape[2])]
        for run in _equal_runs(_span_lengths(packed_seq_params)):
            if run.context_length == 0:
                outputs.append(query.new_zeros(run.num_rows, outputs[0].shape[1]))
                continue
            batched = (
                query[run.rows].unflatten(0, (run.num_spans, run.length)),
                key[run.context_rows].unflatten(0, (run.num_spans, run.context_length)),
                value[run.context_rows].unflatten(0, (run.num_spans, run.context_length)),
            )
            outputs.append(self._attend(*batched, is_causal=is_causal, dropout=dropout))
        return torch.cat(outputs)

    def _attend_to_all_ranks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: PackedSeqParams,
        *,
        is_causal: bool,
        dropout: float,
    ) -> Tensor:
        """The rows of this rank against those of all context-parallel ranks."""
        assert self.context_group is not None
        num_ranks, rank = self.context_group.size(), self.context_group.rank()
        lengths = _span_lengths(params)
        # In one message, so that gradients come back in one order on all ranks.
        both = gather_rows(
            torch.cat([key, value], dim=-1), [length for length, _ in lengths], self.context_group
        )
        keys, values = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        outputs = [query.new_empty(0, query.shape[1] * query.shape[2])]
        for run in _equal_runs(lengths):
            places = torch.tensor(rows_of_context_rank([run.length], num_ranks, rank))
            seen = torch.arange(run.length)[None, :] <= places[:, None] if is_causal else None
            own = slice(run.start // num_ranks, (run.start + run.num_rows) // num_ranks)
            batched = (
                query[own].unflatten(0, (run.num_spans, -1)),
                keys[run.rows].unflatten(0, (run.num_spans, run.length)),
                values[run.rows].unflatten(0, (run.num_spans, run.length)),
            )
            seen = None if seen is None else to_device(seen, query.device)
            outputs.append(self._attend(*batched, is_causal=False, dropout=dropout, seen=seen))
        return torch.cat(outputs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        dropout: float,
        seen: Tensor | None = None,
    ) -> Tensor:
        """``[c, L, heads, d]`` each, for c spans, to ``[c * L, a * d]`` with L of the query.

        ``seen`` says of every row of the query which rows it reads, where that is neither all nor
        those before it.
        """

        def attend() -> Tensor:
            return scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=seen,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )

        if dropout > 0.0:
            # Heads differ between tensor-parallel ranks, so their dropout must differ as well.
            with get_cuda_rng_tracker().fork():
                output = attend()
        else:
            output = attend()
        return output.transpose(1, 2).flatten(2).flatten(0, 1)


def _span_lengths(params: PackedSeqParams) -> Sequence[tuple[int, int]]:
    """Rows of each span, and the rows that it reads."""
    if isinstance(params, SpanParams):
        return list(zip(params.span_lengths, params.context_lengths, strict=True))
    lengths = (params.cu_seqlens_q.diff().tolist(), params.cu_seqlens_kv.diff().tolist())
    return list(zip(*lengths, strict=True))


class _Run(NamedTuple):
    """Neighbouring spans of one length that read as many rows each."""

    start: int
    context_start: int
    num_spans: int
    length: int
    context_length: int

    @property
    def num_rows(self) -> int:
        return self.num_spans * self.length

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_rows)

    @property
    def context_rows(self) -> slice:
        return slice(self.context_start, self.context_start + self.num_spans * self.context_length)


def _equal_runs(lengths: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    """Spans grouped with their equal neighbours, empty ones left out."""
    start = context_start = 0
    for (length, context_length), group in groupby(lengths):
        run = _Run(start, context_start, len(list(group)), length, context_length)
        if length:
            yield run
        start += run.num_rows
        context_start += run.num_spans * context_length


def _is_causal(mask_type: AttnMaskType) -> bool:
    if mask_type not in _CAUSAL | _FULL:
        raise UnsupportedError(f"SpanAttention knows causal and full attention, not {mask_type}")
    return mask_type in _CAUSAL


def _refuse_what_is_not_supported(config: TransformerConfig, attention_type: str) -> None:
    reasons = {
        "cross-attention with context parallelism": (
            config.context_parallel_size > 1 and attention_type == "cross"
        ),
        "sliding windows": config.window_size is not None,
        f"softmax type {config.softmax_type!r}": config.softmax_type != "vanilla",
        f"attention type {attention_type!r}": attention_type not in ("self", "cross"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(
                f"SpanAttention does not support {reason}; "
                f"use transformer_impl='transformer_engine'"
            )
