"""Problems from sizes: what is frozen, what a configuration gives, and what is refused."""

import pytest
from cost_cases import GPUS, MODELS, ROOT, causal, dit, item, times, vit

from megatron_dip.costs import (
    ClusterConfig,
    ItemSize,
    Kernels,
    ModelShape,
    ProblemBuilder,
    Profile,
    cluster_builder,
    config_builder,
    load_cluster,
    load_model,
)
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.errors import ConfigError, ProblemError
from megatron_dip.families.configs import load_config
from megatron_dip.workload import TransferCost, parse_problem

CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))


def builder(*modules):
    model = times()
    return ProblemBuilder(
        model=ModelShape(name="small", modules=modules),
        times=model,
        memory=MemoryModel(parallel=model.parallel),
        num_ranks=2,
        memory_limit_bytes=10**9,
        transfer=TransferCost(latency_us=1.0, bytes_per_us=1.0),
    )


def vision_language(vision_trains, language_trains):
    projector = {"intermediate_size": 32, "output_size": 8}
    made = builder(
        vit(trainable=vision_trains, projector=projector),
        causal(trainable=language_trains, upstream=("vision",)),
    )
    problem = made.build([{"vision": [item(8)], "language": [item(16, needs={"vision": (0,)})]}])
    return problem.item("vision", 0, 0), problem.item("language", 0, 0)


def test_trainable_modules_have_all_gradients():
    for found in vision_language(True, True):
        assert min(found.input_grad_us, found.weight_grad_us, found.activation_bytes) > 0
        assert found.first_extra_input_grad_us == 0


def test_frozen_with_nothing_trainable_before_it_has_no_backward():
    vision, language = vision_language(False, True)
    assert vision.forward_us > 0
    assert (vision.input_grad_us, vision.weight_grad_us, vision.activation_bytes) == (0, 0, 0)
    assert (vision.last_extra_input_grad_us, vision.last_extra_weight_grad_us) == (0, 0)
    assert language.weight_grad_us > 0


def test_frozen_after_something_trainable_passes_the_gradient_on():
    vision, language = vision_language(True, False)
    assert vision.weight_grad_us > 0
    assert language.input_grad_us > 0
    assert (language.weight_grad_us, language.last_extra_weight_grad_us) == (0, 0)
    assert 0 < language.activation_bytes < vision_language(True, True)[1].activation_bytes


@pytest.mark.parametrize("text_trains", [True, False])
def test_a_dit_passes_a_gradient_to_its_captions_where_the_encoder_trains(text_trains):
    made = builder(
        causal(name="text", has_head=False, trainable=text_trains), dit(upstream=("text",))
    )
    problem = made.build([{"text": [item(4)], "dit": [item(16, context=4)]}])
    assert (problem.item("dit", 0, 0).first_extra_input_grad_us > 0) == text_trains


def test_a_module_without_items_is_left_out_of_its_microbatch():
    problem = builder(vit()).build([{"vision": []}, {"vision": [item(4), item(6)]}])
    assert [list(microbatch) for microbatch in problem.microbatches] == [[], ["vision"]]
    assert [entry.item for entry in problem.items("vision", 1)] == [0, 1]
    assert parse_problem(problem.model_dump(mode="json")) == problem


def test_items_of_an_unknown_module_are_refused():
    with pytest.raises(ProblemError, match=r"microbatches.1: unknown modules \['audio'\]"):
        builder(vit()).build([{"vision": [item(4)]}, {"audio": [item(4)]}])


def test_the_tiny_configuration_gives_operations_over_its_rate():
    sizes = {
        "vision": [ItemSize(tokens=64, spans=(64,)), ItemSize(tokens=100, spans=(100,))],
        "language": [ItemSize(tokens=500, spans=(200, 300), needs={"vision": (0, 1)})],
    }
    config = load_config(ROOT / "configs" / "vlm_tiny.yaml")
    made = config_builder(
        config.schedule,
        config.model_shape(),
        config.partition(2),
        num_ranks=2,
        kernels=Kernels(is_fp32=True),
    )
    problem = made.build([sizes])
    image, sequence = problem.item("vision", 0, 1), problem.item("language", 0, 0)
    rate = 45000.0
    linear = 2 * 100 * (4 * 128**2 + 2 * 128 * 512) / rate
    core = 4 * 100**2 * 128 / rate
    assert image.forward_us == pytest.approx(linear + core)
    assert image.input_grad_us == pytest.approx(linear + 2 * core)
    assert image.weight_grad_us == pytest.approx(linear)
    assert image.last_extra_forward_us == pytest.approx(2 * 25 * (512 * 512 + 512 * 192) / rate)
    linear = 2 * 500 * (2 * 192**2 + 2 * 192 * 64 + 3 * 192 * 512) / rate
    core = 2 * (200**2 + 300**2) * 192 / rate
    assert sequence.forward_us == pytest.approx(linear + core)
    assert sequence.last_extra_weight_grad_us == pytest.approx(2 * 500 * 192 * 3072 / rate)
    sums = 2 + 6
    assert sequence.activation_bytes == 4 * 500 * (6 * 192 + 2 * 64 + 3 * 512 + sums)
    assert sequence.boundary_bytes == 4 * 500 * 192
    assert sequence.needs == {"vision": (0, 1)}
    assert problem.module("language").layer_overhead_us == 200.0


@pytest.mark.parametrize(
    ("name", "published_billions", "layers_billions"),
    [
        ("vlm_s", 12, 11.26),
        ("vlm_m", 37, 35.48),
        ("vlm_l", 94, 91.96),
        ("t2v_s", 13, 11.91),
        ("t2v_l", 62, 60.20),
    ],
)
def test_parameter_counts_are_near_the_published_totals(name, published_billions, layers_billions):
    """Layers alone by hand; published totals count the layers or the whole, as each file says."""
    model = load_model(ROOT / "configs" / "models" / f"{name}.yaml")
    layers = sum(m.num_layers * m.layer_linear_parameters() for m in model.modules) / 1e9
    whole = model.num_parameters() / 1e9
    assert layers == pytest.approx(layers_billions, abs=0.01)
    assert layers < whole
    assert min(abs(found / published_billions - 1) for found in (layers, whole)) < 0.1


@pytest.mark.parametrize(
    ("name", "module", "billions"),
    [
        ("vlm_s", "language", 8.03),  # Llama 3 8B
        ("vlm_m", "language", 32.76),  # Qwen2.5 32B
        ("vlm_l", "language", 72.71),  # Qwen2.5 72B
        ("vlm_xl", "language", 175.2),  # GPT 175B
        ("t2v_s", "text", 8.03 - 0.525),  # Llama 3 8B, less its head
    ],
)
def test_language_models_have_their_published_number_of_parameters(name, module, billions):
    model = load_model(ROOT / "configs" / "models" / f"{name}.yaml")
    assert model.module(module).num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_cluster_files_have_whole_replicas(path):
    cluster = load_cluster(path)
    assert cluster.name == path.stem
    large = {"h100_8192": 128, "h100_16384": 128, "h100_3072": 96, "h100_6144": 96}
    assert cluster.data_parallel == large.get(path.stem, 1)
    assert cluster.transfer().bytes_per_us == pytest.approx(40000.0)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_fits_its_cluster(name):
    cluster = load_cluster(ROOT / "configs" / "clusters" / f"h100_{GPUS[name]}.yaml")
    made = cluster_builder(load_model(ROOT / "configs" / "models" / f"{name}.yaml"), cluster)
    assert made.num_ranks == cluster.pipeline_parallel
    assert made.memory_limit_bytes == 80 * 10**9
    static = sum(m.num_layers * made.memory.layer_static_bytes(m) for m in made.model.modules)
    assert static / made.num_ranks < made.memory_limit_bytes


def cluster(**fields):
    given = {"name": "c", "gpu": "H100", "num_gpus": 16, "pipeline_parallel": 4} | fields
    return ClusterConfig.parse(given, ConfigError, "c.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "B200"}, "gpu: no preset 'B200'"),
        ({"num_gpus": 6}, "num_gpus 6 is not a multiple of .* = 4"),
        ({"num_gpus": 0}, "num_gpus: Input should be greater than 0"),
        ({"pipeline": 4}, "pipeline: Extra inputs"),
        ({"assumptions": {"efficiency": 1.5}}, "assumptions.efficiency: .*less than or equal"),
    ],
)
def test_a_malformed_cluster_names_the_field(fields, message):
    with pytest.raises(ConfigError, match=f"c.yaml: .*{message}"):
        cluster(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"context_size": 8}, "context_size is needed by dit modules"),
        ({"upstream": ["audio"]}, r"modules.1.upstream: \['audio'\] not among"),
        ({"name": "vision"}, "modules.1.name: 'vision' repeats"),
        ({"hidden_size": 16, "upstream": ["vision"]}, "modules.1.hidden_size: 16, but vision"),
        ({"kind": "moe"}, "modules.1.kind: Input should be 'vit', 'causal', 'dit' or 'generic'"),
        ({"num_layers": 0}, "modules.1.num_layers: .*greater than 0"),
    ],
)
def test_a_malformed_model_names_the_field(change, message):
    modules = [vit().model_dump(), causal().model_dump() | change]
    with pytest.raises(ConfigError, match=f"m.yaml: .*{message}"):
        ModelShape.parse({"name": "m", "modules": modules}, ConfigError, "m.yaml")


def test_tensor_ranks_that_do_not_divide_a_model_are_refused():
    model = ModelShape(name="m", modules=(causal(),))
    with pytest.raises(ConfigError, match=r"tensor_parallel 4 .* language.num_query_groups 2"):
        cluster_builder(model, cluster(tensor_parallel=4))


def test_optimizer_state_is_divided_only_by_a_distributed_optimizer():
    model = ModelShape(name="m", modules=(causal(),))
    found = [
        cluster_builder(model, cluster(distributed_optimizer=distributed)).memory
        for distributed in (True, False)
    ]
    assert [memory.optimizer_shards for memory in found] == [4, 1]


def test_assumptions_replace_the_presets_rates():
    plain = {"efficiency": 0.5, "layer_overhead_us": 60.0}
    plain |= {"memory_traffic": False, "collectives": False}
    model = ModelShape(name="m", modules=(causal(),))
    made = cluster_builder(model, cluster(tensor_parallel=2, num_gpus=8, assumptions=plain))
    problem = made.build([{"language": [item(1000)]}])
    flops = 2 * 1000 * 576 + 2 * 1000**2 * 8
    assert problem.item("language", 0, 0).forward_us == pytest.approx(flops / 2 / 494.5e6)
    assert problem.module("language").layer_overhead_us == 60.0
    curved = cluster_builder(model, cluster(tensor_parallel=2, num_gpus=8))
    assert curved.times.overhead_us(model.modules[0]) > 40.0


def test_a_profile_replaces_operations_in_the_same_builder():
    measured = {
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 4,
        "times": {
            "overhead_us": 3.0,
            "forward": {"token_us": 0.5, "pair_us": 0.25},
            "backward": {"token_us": 1.0},
        },
    }
    given = {"device": "any", "parallel": {"sequence_parallel": True}}
    profile = Profile.parse(given | {"modules": {"language": measured}}, ConfigError)
    model = ModelShape(name="m", modules=(causal(),))
    problem = cluster_builder(model, cluster(), profile).build([{"language": [item(16)]}])
    found = problem.item("language", 0, 0)
    assert (found.forward_us, found.input_grad_us, found.weight_grad_us) == (72.0, 16.0, 16.0)
    assert problem.module("language").layer_overhead_us == 3.0
