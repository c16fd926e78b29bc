"""Costs of modules that are known by their widths and by the weights of their built stages."""

from types import SimpleNamespace

import pytest
from cost_cases import causal, item, plain_device, times, vit

from megatron_dip.costs import Kernels, ModelShape, ModuleShape, Parallelism, ProblemBuilder
from megatron_dip.costs.builder import measured_model
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.shapes import GenericLayers
from megatron_dip.costs.weights import PartWeights, StageFacts
from megatron_dip.errors import ConfigError
from megatron_dip.models.module_shapes import module_shape
from megatron_dip.workload import TransferCost

HELD = PartWeights(50)


def generic(**fields):
    """Hidden 8, queries of 16 channels, keys and values of 8, MLP of 32: 960 weights that act."""
    layers = {"attention_size": 16, "key_value_size": 8, "is_gated": True, "is_causal": True}
    return ModuleShape(
        name=fields.pop("name", "language"),
        kind="generic",
        num_layers=fields.pop("num_layers", 4),
        hidden_size=8,
        ffn_hidden_size=32,
        num_attention_heads=4,
        generic=GenericLayers(**(layers | fields.pop("layers", {}))),
        **fields,
    )


def stages(*layers, before=HELD, after=HELD, module="language"):
    """Two stages of two layers."""
    return [
        StageFacts(module, 0, layers[:2], before, PartWeights()),
        StageFacts(module, 2, layers[2:], PartWeights(), after),
    ]


def measured(shape, *layers, **ends):
    return measured_model(ModelShape(name="m", modules=(shape,)), stages(*layers, **ends))


def problem(model, *, parallel=None, **memory):
    division = parallel or Parallelism()
    builder = ProblemBuilder(
        model=model,
        times=times(plain_device(), **division.model_dump()),
        memory=MemoryModel(parallel=division, **memory),
        num_ranks=2,
        memory_limit_bytes=10**9,
        transfer=TransferCost(latency_us=1.0, bytes_per_us=1.0),
    )
    return builder.build([{"language": [item(6, 10, output_tokens=4)]}])


def test_times_follow_from_the_weights_that_stages_hold():
    made = problem(measured(generic(), *[PartWeights(1000)] * 4)).item("language", 0, 0)
    core = 4 * 16 * (6**2 + 10**2) / 2
    assert made.forward_us == 2 * 1000 * 16 + core
    assert made.input_grad_us == 2 * 1000 * 16 + 2 * core
    assert made.weight_grad_us == 2 * 1000 * 16


def test_widths_state_the_times_where_no_stage_was_read():
    made = problem(ModelShape(name="m", modules=(generic(),))).item("language", 0, 0)
    assert made.weight_grad_us == 2 * (8 * (16 + 8 + 16) + 3 * 8 * 32) * 16


def test_of_experts_count_those_that_a_token_meets_on_the_rank():
    shape = generic(layers={"expert_share": 0.25})
    model = measured(shape, *[PartWeights(100, 0, 800)] * 4)
    assert problem(model).item("language", 0, 0).weight_grad_us == 2 * (100 + 200) * 16
    divided = problem(model, parallel=Parallelism(expert=2))
    assert divided.item("language", 0, 0).weight_grad_us == 2 * (100 + 400) * 16


def test_what_is_trained_is_read_and_not_declared():
    layers = (*[PartWeights(0, 1000)] * 3, PartWeights(20, 1000))
    made = problem(measured(generic(), *layers, before=PartWeights(0, 100)))
    module, only = made.module("language"), made.item("language", 0, 0)
    assert module.trained_ranges == (range(3, 4),)
    assert (module.trains_first_extra, module.trains_last_extra) == (False, True)
    assert made.first_with_backward == {"language": 3}
    assert only.weight_grad_us == 2 * 20 * 16


def test_a_frozen_module_has_no_backward():
    frozen = PartWeights(0, 10)
    made = problem(measured(generic(), *[frozen] * 4, before=frozen, after=frozen))
    assert not made.module("language").trainable
    assert made.first_with_backward == {}


def test_static_bytes_are_those_of_the_weights_held():
    layers = (PartWeights(0, 100), PartWeights(0, 300), PartWeights(50, 0, 40), PartWeights(50))
    model = measured(generic(), *layers, before=PartWeights(0, 7), after=PartWeights(3))
    module = problem(model, parallel=Parallelism(expert=2), optimizer_shards=4).module("language")
    one, expert = 2 + 4 + 12 / 4, 2 + 4 + 12 / 2
    assert module.layer_static_bytes == round((100 * one + 40 * expert) / 2)
    assert module.frozen_layer_static_bytes == 2 * 200
    assert module.first_layer_extra.static_bytes == 2 * 7
    assert module.last_layer_extra.static_bytes == 3 * one


def test_own_shapes_take_weights_and_trained_layers_of_stages_too():
    layers = [PartWeights(0, 9), PartWeights(9), PartWeights(9), PartWeights(9)]
    model = measured(causal(num_layers=4), *layers)
    module = problem(model).module("language")
    assert module.trained_ranges == (range(1, 4),)
    assert (module.layer_static_bytes, module.frozen_layer_static_bytes) == (9 * 18, 9 * 2)


def test_a_head_is_as_large_as_its_vocabulary_also_where_it_shares_the_embedding():
    model = measured(generic(vocab_size=64), *[PartWeights(10)] * 4, after=PartWeights(8))
    only = problem(model).item("language", 0, 0)
    assert only.last_extra_forward_us == 2 * 8 * 64 * 16
    assert (only.first_extra_forward_us, only.first_extra_weight_grad_us) == (0.0, 0.0)


def test_a_projection_takes_its_weights_per_row():
    model = measured(generic(), *[PartWeights(10)] * 4, after=PartWeights(0, 300))
    only = problem(model).item("language", 0, 0)
    assert (only.last_extra_forward_us, only.last_extra_weight_grad_us) == (2 * 300 * 4, 0.0)


def test_a_plain_layer_keeps_34_bytes_per_token_and_channel():
    """Korthikanti et al., section 4.1, beside the scores: fused attention keeps a sum of them."""
    layers = {"attention_size": 8, "key_value_size": 16, "is_gated": False}
    memory = MemoryModel(parallel=Parallelism(), kernels=Kernels(hidden_dropout=True))
    kept = memory.activation_bytes(generic(layers=layers), item(16))
    assert kept == 34 * 16 * 8 + 4 * 16 * 4


def test_frozen_layers_keep_no_inputs_of_linear_layers():
    memory = MemoryModel(parallel=Parallelism())
    frozen = measured(generic(), *[PartWeights(0, 9)] * 4).modules[0]
    trained = measured(generic(), *[PartWeights(9)] * 4).modules[0]
    saved = memory.activation_bytes(trained, item(16)) - memory.activation_bytes(frozen, item(16))
    assert saved == 2 * 16 * (8 + 8 + 32)


def test_stages_that_miss_a_layer_are_refused():
    model = ModelShape(name="m", modules=(generic(),))
    with pytest.raises(ConfigError, match=r"language hold the layers \[0, 1\] \(expected each of"):
        measured_model(model, stages(*[PartWeights(1)] * 4)[:1])


def test_a_tower_may_change_its_width_in_a_way_of_its_own():
    tower = generic(name="tower", layers={"is_causal": False})
    reader = vit(name="language", hidden_size=12, upstream=("tower",))
    assert ModelShape(name="m", modules=(tower, reader)).module("language").hidden_size == 12


def config(**fields):
    return SimpleNamespace(
        **{
            "num_layers": 4,
            "hidden_size": 8,
            "num_attention_heads": 4,
            "ffn_hidden_size": 32,
            "num_query_groups": 2,
            "kv_channels": 3,
            "gated_linear_unit": True,
            "num_moe_experts": None,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": None,
            "moe_shared_expert_intermediate_size": None,
            "moe_layer_freq": 1,
        }
        | fields
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (12, 12, 32, 1.0)),
        ({"num_moe_experts": 8, "moe_ffn_hidden_size": 10}, (12, 12, 20, 0.25)),
        (
            {
                "num_moe_experts": 8,
                "moe_ffn_hidden_size": 10,
                "moe_layer_freq": [0, 1, 1, 0],
                "moe_shared_expert_intermediate_size": 4,
            },
            (12, 12, 28, 0.25),
        ),
        (
            {
                "multi_latent_attention": True,
                "qk_head_dim": 4,
                "qk_pos_emb_head_dim": 1,
                "v_head_dim": 2,
            },
            (20, 28, 32, 1.0),
        ),
    ],
    ids=["grouped queries", "experts", "experts in some layers", "latent attention"],
)
def test_a_configuration_gives_the_widths_that_act(fields, expected):
    made = module_shape("language", config(**fields), causal=True, vocab_size=64)
    layers = made.generic
    found = (
        layers.attention_size,
        layers.key_value_size,
        made.ffn_hidden_size,
        layers.expert_share,
    )
    assert found == expected
