"""Attention of CPU mode on two context-parallel ranks, against all rows on one; saves what it saw.

Usage: ``megatron_dip.launch --cpu context_parallel_worker.py FOLDER MODE...``, on two ranks.
"""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.context_rows import rows_of_context_rank

NUM_HEADS, NUM_GROUPS, WIDTH, NUM_SAMPLES = 4, 2, 8, 2
NUM_RANKS = 2
LENGTHS = [8, 0, 4]


def attention(kind: AttnMaskType, num_ranks: int) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=NUM_HEADS * WIDTH,
        num_attention_heads=NUM_HEADS,
        num_query_groups=NUM_GROUPS,
        attention_dropout=0.0,
        context_parallel_size=num_ranks,
    )
    return DotProductAttention(config, 1, kind, attention_type="self")


def run(num_ranks: int, rows: torch.Tensor, kind: AttnMaskType, is_packed: bool) -> torch.Tensor:
    """Output and gradients side by side, [rows, samples, channels] of ``rows`` of the samples."""
    torch.manual_seed(7)
    num_rows = sum(LENGTHS)
    shape = (num_rows,) if is_packed else (num_rows, NUM_SAMPLES)
    whole = [torch.randn(*shape, heads, WIDTH) for heads in (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)]
    weights = torch.randn(*shape, NUM_HEADS * WIDTH)
    parts = [part[rows].requires_grad_() for part in whole]
    packing = None
    if is_packed:
        starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    output = attention(kind, num_ranks)(*parts, None, packed_seq_params=packing)
    (output * weights[rows]).sum().backward()
    return torch.cat([output, *(part.grad.flatten(-2) for part in parts)], dim=-1)


def compare(kind: AttnMaskType, is_packed: bool) -> float:
    """The largest difference of this rank's rows."""
    rank = parallel_state.get_context_parallel_rank()
    lengths = LENGTHS if is_packed else [sum(LENGTHS)]
    own = torch.tensor(rows_of_context_rank(lengths, NUM_RANKS, rank))
    found = run(NUM_RANKS, own, kind, is_packed)
    expected = run(1, torch.arange(sum(LENGTHS)), kind, is_packed)
    return float((found - expected[own]).detach().abs().max())


CASES = {
    "causal": lambda: compare(AttnMaskType.causal, is_packed=False),
    "full": lambda: compare(AttnMaskType.no_mask, is_packed=False),
    "packed": lambda: compare(AttnMaskType.padding_causal, is_packed=True),
}

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=NUM_RANKS)
    model_parallel_cuda_manual_seed(1)
    folder = Path(sys.argv[1])
    for mode in sys.argv[2:]:
        torch.save(CASES[mode](), folder / f"{mode}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
