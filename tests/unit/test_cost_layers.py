"""Operations of layers, counted by hand; times of devices; rules of division."""

import dataclasses
import math

import pytest
from cost_cases import causal, dit, item, plain_device, times, vit

from megatron_dip.costs import ItemSize, ModuleShape, Parallelism
from megatron_dip.costs.devices import device_preset
from megatron_dip.costs.layers import (
    first_operations,
    last_operations,
    layer_operations,
    total_flops,
)
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.shapes import ExpertsShape
from megatron_dip.errors import ConfigError


def flops(make, module, size, **parallel):
    return total_flops(make(module, size, Parallelism(**parallel), 2))


@pytest.mark.parametrize(
    ("module", "size", "linear", "cores"),
    [
        # 2 n w, and 4 s^2 h over each span
        (vit(), item(10), 2 * 10 * 768, 4 * 100 * 8),
        (vit(), item(4, 6), 2 * 10 * 768, 4 * (16 + 36) * 8),
        # half of it where causal
        (causal(), item(10), 2 * 10 * 576, 2 * 100 * 8),
        (causal(), item(4, 6), 2 * 10 * 576, 2 * (16 + 36) * 8),
        # 896 weights on video tokens, keys and values (2 x 64) on the caption's; 4 n m h across
        (dit(), item(10, context=3), 2 * 10 * 896 + 2 * 3 * 128, 4 * 100 * 8 + 4 * 10 * 3 * 8),
        # and a modulation network of 6 x 64 on one row per clip
        (
            dit(modulation="per_layer"),
            item(4, 6, context=3),
            2 * 10 * 896 + 2 * 3 * 128 + 2 * 2 * 384,
            4 * (16 + 36) * 8 + 4 * 10 * 3 * 8,
        ),
    ],
)
def test_a_layer_computes_what_is_counted_by_hand(module, size, linear, cores):
    expected = (linear + cores, linear + 2 * cores, linear)
    assert flops(layer_operations, module, size) == pytest.approx(expected)


def test_the_head_projects_on_the_vocabulary_and_an_encoder_has_none():
    assert flops(last_operations, causal(), item(10)) == (2 * 10 * 8 * 64,) * 3
    assert flops(last_operations, causal(has_head=False), item(10)) == (0, 0, 0)


def test_the_projector_works_on_merged_rows():
    module = vit(projector={"merge": 4, "intermediate_size": 32, "output_size": 16})
    assert flops(last_operations, module, item(8)) == (2 * 2 * (32 * 32 + 32 * 16),) * 3
    assert flops(last_operations, vit(), item(8)) == (0, 0, 0)


def test_what_sits_before_the_first_layer_takes_no_gradient_of_the_data():
    assert flops(first_operations, vit(), item(10)) == (2 * 10 * 12 * 8, 0, 2 * 10 * 12 * 8)
    assert flops(first_operations, causal(), item(10)) == (0, 0, 0)


def test_the_first_part_of_a_dit_conditions_and_passes_a_gradient_to_its_captions():
    patches, caption, clip = 2 * 10 * 16 * 8, 2 * 3 * 8 * 8, 2 * (256 + 8) * 8 + 2 * 8 * 48
    forward, input_grad, weight_grad = flops(first_operations, dit(), item(10, context=3))
    assert forward == weight_grad == patches + caption + clip
    assert input_grad == caption + clip


@pytest.mark.parametrize("module", [vit(), causal(), dit()])
def test_tensor_and_context_ranks_share_the_operations_of_a_layer(module):
    whole = flops(layer_operations, module, item(8, context=0))
    # Images are whole on every context-parallel rank.
    context_parts = 1 if module.kind == "vit" else 2
    for parallel, parts in (({"tensor": 2}, 2), ({"context": 2}, context_parts)):
        assert flops(layer_operations, module, item(8, context=0), **parallel) == pytest.approx(
            [value / parts for value in whole]
        )


@pytest.mark.parametrize(("module", "number"), [(vit(), 2), (causal(), 2), (dit(), 3)])
def test_tensor_parallelism_joins_each_region_once_per_direction(module, number):
    alone = times(plain_device(), tensor=2)
    linked = times(plain_device(), link_bytes_per_us=4.0, tensor=2)
    size = item(10, context=3)
    # An all-reduce over two ranks moves as many bytes as there are: 10 tokens x 8 x 2 bytes.
    expected_us = number * 10 * 8 * 2 / 4.0
    before, after = alone.layer(module, size), linked.layer(module, size)
    assert after.forward_us - before.forward_us == pytest.approx(expected_us)
    assert after.input_grad_us - before.input_grad_us == pytest.approx(expected_us)
    assert after.weight_grad_us == before.weight_grad_us


def test_one_tensor_rank_joins_nothing():
    linked, alone = times(plain_device(), link_bytes_per_us=4.0), times(plain_device())
    assert linked.layer(vit(), item(10)) == alone.layer(vit(), item(10))


def test_sequence_parallelism_shortens_norms_and_leaves_operations():
    size, module = item(64), vit()
    with_it = layer_operations(module, size, Parallelism(tensor=2, sequence_parallel=True), 2)
    without = layer_operations(module, size, Parallelism(tensor=2), 2)
    assert total_flops(with_it) == total_flops(without)
    by_name = {operation.name: operation.forward_bytes for operation in without}
    for operation in with_it:
        factor = 0.5 if operation.name.endswith(("norm", "residual")) else 1.0
        assert operation.forward_bytes == pytest.approx(factor * by_name[operation.name])


def test_tensor_ranks_read_or_write_whole_rows_at_the_edges_of_a_region():
    operations = layer_operations(vit(), item(10), Parallelism(tensor=2), 2)
    moved = {operation.name: operation.forward_bytes for operation in operations}
    assert moved["query_key_value"] == 10 * 2 * (8 + 24 / 2)
    assert moved["attention"] == 10 * 2 * 32 / 2
    assert moved["attention_output"] == 10 * 2 * (8 / 2 + 8)
    assert moved["mlp_in"] == 10 * 2 * (8 + 32 / 2)
    assert moved["mlp_activation"] == 10 * 2 * 2 * 32 / 2
    assert moved["mlp_out"] == 10 * 2 * (32 / 2 + 8)
    assert moved["mlp_norm"] == 10 * 2 * 2 * 8
    assert moved["mlp_residual"] == 10 * 2 * 3 * 8


def test_the_ring_of_context_parallelism_shows_only_where_attention_is_shorter():
    size, module = item(64), causal()
    free = times(plain_device(), context=2).layer(module, size)
    core_us = 2 * 64 * 64 * 8 / 2
    sent_bytes = 2 * 32 * 8  # keys and values of 4 each, 32 tokens, one hop
    hidden = times(plain_device(), link_bytes_per_us=sent_bytes / core_us, context=2)
    assert hidden.layer(module, size) == free
    shown = times(plain_device(), link_bytes_per_us=sent_bytes / core_us / 3, context=2)
    assert shown.layer(module, size).forward_us == pytest.approx(free.forward_us + 2 * core_us)


@pytest.mark.parametrize("module", [vit(), causal(), dit()])
def test_more_tokens_never_take_less_time(module):
    model = times(link_bytes_per_us=360e3, tensor=2, sequence_parallel=True)
    found = [model.layer(module, item(tokens, context=16)) for tokens in range(1, 400, 7)]
    for phase in range(3):
        values = [entry[phase] for entry in found]
        assert values == sorted(values)
        assert values[0] > 0


def test_a_split_span_takes_less_time_than_a_whole_one():
    model = times(plain_device())
    assert model.layer(vit(), item(5, 5)).forward_us < model.layer(vit(), item(10)).forward_us


def test_kernels_are_bound_by_operations_or_by_bytes():
    device = device_preset("H100").with_constant_rate(0.5)
    assert device.kernel_us(989e6, 0) == pytest.approx(2.0)
    assert device.kernel_us(0, 3.35e6) == pytest.approx(1.0)
    assert device.kernel_us(989e6, 3.35e6 * 3) == pytest.approx(3.0)
    assert device.without_memory_traffic().kernel_us(989e6, 1e12) == pytest.approx(2.0)


def test_the_achieved_rate_grows_with_size_towards_the_best():
    device = device_preset("H100")
    rates = [device.efficiency(10.0**power) for power in range(6, 14)]
    assert rates == sorted(rates)
    assert device.efficiency(device.half_rate_flops) == pytest.approx(device.best_efficiency / 2)
    assert rates[-1] == pytest.approx(device.best_efficiency, rel=1e-3)
    assert device.efficiency(0.0) == 0.0


def test_an_items_time_and_the_start_of_a_kernel_make_the_kernels_time():
    device = device_preset("H100")
    separate = device.start_us() + device.item_us(1e9, 0) + device.item_us(5e9, 0)
    assert device.kernel_us(6e9, 0) == pytest.approx(separate)


def test_items_and_overhead_add_up_to_a_call():
    model = times(link_bytes_per_us=360e3, tensor=4, sequence_parallel=True)
    module = vit(hidden_size=3072, ffn_hidden_size=12288, num_attention_heads=24)
    sizes = [item(256), item(1296), item(2704), item(676)]
    parts = model.overhead_us(module) + sum(model.layer(module, s).forward_us for s in sizes)
    assert model.call_us(module, sizes) == pytest.approx(parts, rel=0.05)


def test_a_call_pays_launches_and_half_of_all_starts_in_each_direction():
    device = device_preset("H100")
    # Four linear layers in three phases, and the core of attention in two.
    assert times().overhead_us(vit()) == pytest.approx(40 + (4 * 3 + 2) / 2 * device.start_us())
    joined = times(link_bytes_per_us=1.0, tensor=2).overhead_us(vit())
    assert joined == pytest.approx(times().overhead_us(vit()) + 2 * device.collective_latency_us)


def test_frozen_layers_start_fewer_kernels():
    trainable = times().overhead_us(vit())
    assert times().overhead_us(vit(trainable=False)) < trainable
    flat = dataclasses.replace(device_preset("H100").with_constant_rate(0.5), layer_overhead_us=60)
    assert times(flat).overhead_us(vit()) == 60


@pytest.mark.parametrize(
    ("name", "peak_tflops", "memory_gb", "tb_per_s", "nvlink_gb_per_s"),
    [
        ("A100", 312, 80, 2.039, 300),
        ("H100", 989, 80, 3.35, 450),
        ("H200", 989, 141, 4.8, 450),
        ("H800", 989, 80, 3.35, 200),
    ],
)
def test_presets_state_published_rates(name, peak_tflops, memory_gb, tb_per_s, nvlink_gb_per_s):
    device = device_preset(name)
    assert device.peak_flops_per_us == peak_tflops * 1e6
    assert device.memory_bytes == memory_gb * 10**9
    assert math.isclose(device.memory_bytes_per_us, tb_per_s * 1e6)
    assert device.nvlink_bytes_per_us == nvlink_gb_per_s * 1e3


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"gpu: no preset 'B200' .*'A100', 'H100'"):
        device_preset("B200")


def test_experts_cost_what_their_tokens_take_and_hold_what_all_of_them_are() -> None:
    """Against a dense layer whose MLP is as wide as the experts that a token goes to."""
    dense = ModuleShape(
        name="language",
        kind="causal",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        vocab_size=100,
    )
    experts = ExpertsShape(num_experts=8, top_k=3, ffn_hidden_size=32)
    routed = dense.model_copy(update={"experts": experts})
    size = ItemSize(tokens=40, spans=(40,))
    router = 2.0 * 40 * 64 * 8
    for ours, theirs in zip(
        total_flops(layer_operations(routed, size, Parallelism(), 2)),
        total_flops(layer_operations(dense, size, Parallelism(), 2)),
        strict=True,
    ):
        assert ours == pytest.approx(theirs + router)
    one = 3 * 64 * 32
    assert routed.layer_expert_parameters() == 8 * one
    assert routed.num_parameters() - dense.num_parameters() == 2 * (8 * one - 3 * one + 64 * 8)
    whole = MemoryModel(parallel=Parallelism(), optimizer_shards=4)
    halved = MemoryModel(parallel=Parallelism(expert=2), optimizer_shards=4)
    # Half of the experts, whose optimizer state half as many replicas share.
    saved = 8 * one * (2 + 4 + 12 / 4) - 4 * one * (2 + 4 + 12 / 2)
    assert whole.layer_static_bytes(routed) - halved.layer_static_bytes(routed) == round(saved)
