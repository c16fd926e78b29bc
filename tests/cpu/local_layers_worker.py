"""Megatron's local layers under CPU mode, against attention written out; prints a line per check.

Usage: ``megatron_dip.launch --cpu local_layers_worker.py``, in one process.
"""

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

NUM_HEADS, WIDTH = 2, 8


def config(**changes) -> TransformerConfig:
    fields = {"num_layers": 1, "hidden_size": NUM_HEADS * WIDTH, "num_attention_heads": NUM_HEADS}
    return TransformerConfig(**fields | changes)


def attention(kind: AttnMaskType, **widths: int) -> DotProductAttention:
    # The mask's kind decides, not a kernel.
    return DotProductAttention(
        config(attention_dropout=0.0), 1, kind, attention_type="self", **widths
    )


def draw(num_tokens: int, batch: int, value_width: int = WIDTH) -> list[torch.Tensor]:
    """Queries, keys and values, each [tokens, batch, heads, width]."""
    widths = (WIDTH, WIDTH, value_width)
    return [torch.randn(num_tokens, batch, NUM_HEADS, width) for width in widths]


def expected(query, key, value, is_causal):
    """[tokens, batch, heads x width] by torch's own attention."""
    one, two, three = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(one, two, three, is_causal=is_causal)
    return found.permute(2, 0, 1, 3).flatten(2)


def check_packed_sequences() -> None:
    """Two sequences, an empty one between them, and two tokens that belong to none."""
    query, key, value = (part.squeeze(1) for part in draw(10, 1))
    bounds = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    for kind, is_causal in ((AttnMaskType.causal, True), (AttnMaskType.no_mask, False)):
        found = attention(kind)(query, key, value, None, packed_seq_params=packing)
        for start, end in ((0, 3), (3, 8)):
            parts = (part[start:end, None] for part in (query, key, value))
            torch.testing.assert_close(found[start:end, None], expected(*parts, is_causal))
        assert found.shape == (10, NUM_HEADS * WIDTH) and not found[8:].any()
    print("packed sequences attend to themselves")


def check_positions_in_packed_sequences() -> None:
    """Of two sequences; what stands behind them is left as it is."""
    tokens = torch.randn(7, NUM_HEADS, WIDTH)
    angles = torch.randn(4, 1, 1, WIDTH)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    group = parallel_state.get_context_parallel_group()
    found = apply_rotary_pos_emb(tokens, angles, config(), cu_seqlens=bounds, cp_group=group)
    for start, end in ((0, 2), (2, 5)):
        one = tokens[start:end, None]
        rotated = apply_rotary_pos_emb(one, angles[: end - start], config(), cp_group=group)
        torch.testing.assert_close(found[start:end, None], rotated)
    assert torch.equal(found[5:], tokens[5:])
    print("positions end with the packed sequences")


def check_padded_batch() -> None:
    parts = draw(5, 2)
    packing = PackedSeqParams(qkv_format="sbhd")
    found = attention(AttnMaskType.padding_causal)(*parts, None, packed_seq_params=packing)
    torch.testing.assert_close(found, expected(*parts, True))
    print("a padded batch is causal")


def check_width_of_values() -> None:
    parts = draw(5, 2, value_width=3)
    found = attention(AttnMaskType.causal, k_channels=WIDTH, v_channels=3)(*parts, None)
    torch.testing.assert_close(found, expected(*parts, True))
    print("values have their own width")


def check_norms() -> None:
    assert type(TENorm(config(), 4)) is torch.nn.LayerNorm
    assert type(TENorm(config(normalization="RMSNorm"), 4)) is torch.nn.RMSNorm
    clip = CLIPViTModel(
        config(layernorm_epsilon=1e-3),
        get_vit_layer_with_local_spec(),
        img_h=4,
        img_w=4,
        patch_dim=2,
    )
    assert clip.ln_pre.eps == 1e-3, "the norm does not follow the configuration"
    assert clip(torch.randn(2, 3, 4, 4)).shape == (2, 5, NUM_HEADS * WIDTH)
    print("CLIP is built without Transformer Engine")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    check_packed_sequences()
    check_positions_in_packed_sequences()
    check_padded_batch()
    check_width_of_values()
    check_norms()
    torch.distributed.destroy_process_group()
