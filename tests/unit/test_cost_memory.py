"""Memory of layers, counted by hand."""

import pytest
from cost_cases import causal, dit, item, vit

from megatron_dip.costs import Kernels, Parallelism
from megatron_dip.costs.memory import MemoryModel


def memory(is_fp32=False, optimizer_shards=1, kernels=None, **parallel):
    return MemoryModel(
        parallel=Parallelism(**parallel),
        kernels=kernels or Kernels(is_fp32=is_fp32),
        optimizer_shards=optimizer_shards,
    )


@pytest.mark.parametrize(
    ("fields", "trainable", "expected"),
    [
        ({}, True, 2 + 4 + 12),
        ({"optimizer_shards": 4}, True, 2 + 4 + 3),
        ({"is_fp32": True}, True, 4 + 4 + 8),
        ({}, False, 2),
        ({"is_fp32": True, "optimizer_shards": 8}, False, 4),
    ],
)
def test_bytes_of_a_weight_with_its_gradient_and_optimizer_state(fields, trainable, expected):
    assert memory(**fields).bytes_per_weight(trainable=trainable) == expected


def test_tensor_ranks_share_linear_weights_but_not_norms():
    # 576 weights of linear layers, two norms of 8
    assert memory().layer_static_bytes(causal()) == (576 + 16) * 18
    assert memory(tensor=2).layer_static_bytes(causal()) == (288 + 16) * 18
    assert memory(tensor=2).layer_static_bytes(causal(trainable=False)) == (288 + 16) * 2


def test_embedding_and_head_are_divided_over_the_vocabulary():
    assert memory(tensor=2).first_static_bytes(causal()) == 64 * 8 // 2 * 18
    assert memory(tensor=2).last_static_bytes(causal()) == (64 * 8 + 8) // 2 * 18
    assert memory().last_static_bytes(causal(has_head=False)) == 8 * 18


@pytest.mark.parametrize(
    ("module", "values", "sums"),
    [
        # Inputs of two norms and two linear layers, queries, keys, values and attention's result;
        # both sides of the MLP's activation.  In 32 bits: two sums of each norm, one per head.
        (vit(), 8 * 8 + 2 * 32, 2 * 2 + 4),
        (causal(), 6 * 8 + 2 * 4 + 3 * 16, 2 + 4),
        # Three norms, factors and gates with what they multiply, sines and cosines of two channels.
        (dit(), 12 * 8 + 8 * 8 + 4 * 2 + 2 * 32, 3 * 2 + 2 * 4),
    ],
)
def test_stored_values_per_token_are_what_the_backward_reads(module, values, sums):
    assert memory().activation_bytes(module, item(10)) == 10 * (values * 2 + sums * 4)


@pytest.mark.parametrize("fuses_rotary", [True, False])
def test_rotary_patches_keep_angles_once_for_a_stage_or_sines_and_cosines_in_every_layer(
    fuses_rotary,
):
    model = MemoryModel(
        parallel=Parallelism(),
        kernels=Kernels(fuses_rotary=fuses_rotary),
        layers_per_stage={"vision": 4},
    )
    plain, turned = (
        model.activation_bytes(vit(positions=positions), item(10))
        for positions in ("table", "rotary_2d")
    )
    channels = vit().hidden_size // vit().num_attention_heads
    kept = 4 * channels / 4 if fuses_rotary else 2 * 4 * channels
    assert turned - plain == 10 * kept


def test_a_layer_with_gelu_and_dropout_keeps_what_is_published():
    """Korthikanti et al., arXiv 2205.05198, equation 1: s b h (34 + 5 a s / h) bytes in 16 bits."""
    length, hidden, heads = 64, 8, 4
    published = Kernels(hidden_dropout=True, attention_dropout=True, keeps_scores=True)
    expected = length * hidden * 34 + 5 * heads * length**2
    norm_sums = 2 * 2 * 4 * length
    size = item(length)
    assert memory(kernels=published).activation_bytes(vit(), size) == expected + norm_sums
    # Fused attention keeps a sum per head and row in place of the scores.
    fused = published.model_copy(update={"keeps_scores": False})
    sums = 4 * heads * length
    without = length * hidden * 34 + norm_sums + sums
    assert memory(kernels=fused).activation_bytes(vit(), size) == without


def test_scores_are_kept_span_by_span():
    kernels = Kernels(attention_dropout=True, keeps_scores=True)
    one, two = (memory(kernels=kernels).activation_bytes(vit(), item(*s)) for s in ([8], [5, 3]))
    assert one - two == 5 * 4 * (8**2 - 5**2 - 3**2)


def test_recomputed_layers_keep_their_inputs_by_chunk_or_block():
    size, module = item(10), vit()
    stored, row = memory().activation_bytes(module, size), 10 * 8 * 2

    def kept(method, count, layers):
        kernels = Kernels(recompute="full", recompute_method=method, recompute_num_layers=count)
        model = MemoryModel(
            parallel=Parallelism(), kernels=kernels, layers_per_stage={"vision": layers}
        )
        return layers * model.activation_bytes(module, size)

    assert kept("uniform", 1, 4) == 4 * row
    assert kept("uniform", 2, 4) == 2 * row
    assert kept("block", 1, 4) == row + 3 * stored
    assert kept("block", 9, 4) == 4 * row


def test_a_caption_adds_its_keys_and_values():
    plain = memory().activation_bytes(dit(), item(10))
    assert memory().activation_bytes(dit(), item(10, context=3)) == plain + 3 * 2 * 8 * 2


@pytest.mark.parametrize("make", [vit, causal, dit])
def test_frozen_layers_store_less(make):
    stored = memory().activation_bytes(make(), item(10))
    assert 0 < memory().activation_bytes(make(trainable=False), item(10)) < stored


def test_sequence_parallelism_divides_what_tensor_parallelism_leaves_whole():
    size, module = item(10), vit()
    whole = memory().activation_bytes(module, size)
    assert memory(tensor=2, sequence_parallel=True).activation_bytes(module, size) == whole // 2
    between = 10 * (4 * 8 * 2 + 2 * 2 * 4)
    assert memory(tensor=2).activation_bytes(module, size) == between + (whole - between) // 2


def test_context_ranks_share_tokens():
    whole = memory().activation_bytes(causal(), item(10))
    assert memory(context=2).activation_bytes(causal(), item(10)) == whole // 2
