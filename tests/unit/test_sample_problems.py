"""Costs of the sample problems against the cost model under the same assumptions.

Vision, text and language layers and the head agree to the rounding of the samples.  The samples
take the keys and values of cross-attention over video tokens, where we take them over the
captions', and leave out the core of cross-attention: that explains all of the difference, which is
at most an eighth of a clip's time.
"""

from statistics import mean

import pytest
from cost_cases import GPUS, ROOT, item, stand_in

from megatron_dip.costs import cluster_builder, load_cluster, load_model
from megatron_dip.costs.mixtures import built_in_mixture, draw_microbatches
from megatron_dip.workload import load_problem

SAMPLES = sorted((ROOT / "benchmarks" / "problems").glob("*.json"))
ROUNDING_US = 0.002


def builder_of(name):
    cluster = ROOT / "configs" / "clusters" / f"h100_{GPUS[name]}_half_peak.yaml"
    return cluster_builder(load_model(stand_in(name)), load_cluster(cluster))


def pairs(name, module, suffix="fit-0"):
    """(sample, ours) for every item of ``module``, spans as whole as the item."""
    path = ROOT / "benchmarks" / "problems" / f"{name.replace('_', '-')}-{suffix}.json"
    sample = load_problem(path)
    sizes = [
        {
            module: [
                item(
                    entry.tokens,
                    context=sum(text.tokens for text in microbatch.get("text", ()))
                    if module == "dit"
                    else 0,
                )
                for entry in microbatch.get(module, ())
            ]
        }
        for microbatch in sample.microbatches
    ]
    ours = builder_of(name).build(sizes)
    found = [
        (entry, ours.item(module, number, index))
        for number, microbatch in enumerate(sample.microbatches)
        for index, entry in enumerate(microbatch.get(module, ()))
    ]
    assert found
    return found


def test_all_samples_are_there_and_parse():
    assert len(SAMPLES) == 35
    for path in SAMPLES:
        name = path.stem[:5].replace("-", "_")
        sample, builder = load_problem(path), builder_of(name)
        assert sample.num_ranks == builder.num_ranks
        assert sample.transfer == builder.transfer
        assert sample.memory_limit_bytes[0] == builder.memory_limit_bytes
        for module in sample.modules:
            shape = builder.model.module(module.name)
            assert module.num_layers == shape.num_layers
            assert module.trainable == shape.trainable
            assert module.upstream == shape.upstream
            assert module.layer_overhead_us == builder.times.overhead_us(shape)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vlm_s", "vision"),
        ("vlm_m", "vision"),
        ("vlm_l", "vision"),
        ("t2v_s", "text"),
        ("t2v_l", "text"),
    ],
)
def test_encoder_items_take_the_same_time(name, module):
    for sample, ours in pairs(name, module):
        for field in ("forward_us", "input_grad_us", "weight_grad_us"):
            assert getattr(ours, field) == pytest.approx(getattr(sample, field), abs=ROUNDING_US)


@pytest.mark.parametrize("name", ["vlm_s", "vlm_m", "vlm_l"])
def test_language_items_take_the_same_time_but_for_how_samples_are_packed(name):
    for sample, ours in pairs(name, "language"):
        assert ours.weight_grad_us == pytest.approx(sample.weight_grad_us, abs=ROUNDING_US)
        for field in ("last_extra_forward_us", "last_extra_weight_grad_us"):
            assert getattr(ours, field) == pytest.approx(getattr(sample, field), abs=ROUNDING_US)
        # One span of 8192 tokens is the most that packing can cost.
        assert sample.weight_grad_us < sample.forward_us <= ours.forward_us
        core = sample.input_grad_us - sample.forward_us
        assert sample.forward_us == pytest.approx(sample.weight_grad_us + core, abs=ROUNDING_US)


@pytest.mark.parametrize("name", ["vlm_s", "vlm_m", "vlm_l"])
def test_drawn_sequences_take_about_as_long_as_the_samples(name):
    batch = draw_microbatches(built_in_mixture("vlm"), 100, 0)
    problem = builder_of(name).build(batch)
    ours = mean(problem.item("language", n, 0).forward_us for n in range(100))
    sampled = mean(sample.forward_us for sample, _ in pairs(name, "language"))
    print(f"{name}: forward of a sequence, drawn over sample: {ours / sampled:.3f}")
    assert ours == pytest.approx(sampled, rel=0.03)


@pytest.mark.parametrize("name", ["t2v_s", "t2v_l"])
def test_clips_differ_by_cross_attention_alone(name):
    model = builder_of(name).model.module("dit")
    tensor = builder_of(name).memory.parallel.tensor
    rate = 494.5e6 * tensor
    ratios = []
    for number, (sample, ours) in enumerate(pairs(name, "dit")):
        context = clip_context(name, number)
        hidden = model.hidden_size
        fewer_key_values = 2 * (sample.tokens - context) * 2 * hidden**2 / rate
        core = 4 * sample.tokens * context * hidden / rate
        explained = sample.forward_us - fewer_key_values + core
        assert ours.forward_us == pytest.approx(explained, abs=ROUNDING_US)
        ratios.append(ours.forward_us / sample.forward_us)
    print(f"{name}: forward of clips, ours over sample: {min(ratios):.3f} to {max(ratios):.3f}")
    assert 0.87 < min(ratios) < 1 < max(ratios) < 1.15


def clip_context(name, number):
    path = ROOT / "benchmarks" / "problems" / f"{name.replace('_', '-')}-fit-0.json"
    return sum(text.tokens for text in load_problem(path).microbatches[number]["text"])


@pytest.mark.parametrize(
    ("name", "module", "tokens", "times_us", "stored", "passed", "weights"),
    [
        ("vlm_s", "vision", 2704, (212.127, 238.623, 185.631), 41187328, 2422784, 101842944),
        ("vlm_m", "vision", 2704, (106.064, 119.312, 92.815), 20593664, 1211392, 50921472),
        ("vlm_l", "vision", 2704, (664.669, 710.092, 619.247), 70606848, 4153344, 339738624),
        ("t2v_s", "text", 208, (46.049, 0.0, 0.0), 0, 425984, 109051904),
        ("t2v_l", "text", 208, (51.385, 0.0, 0.0), 0, 266240, 121896960),
    ],
)
def test_items_of_published_models_cost_what_others_count(
    name, module, tokens, times_us, stored, passed, weights
):
    """Microseconds and bytes of one layer, as counted elsewhere from the published dimensions."""
    cluster = ROOT / "configs" / "clusters" / f"h100_{GPUS[name]}_half_peak.yaml"
    model = load_model(ROOT / "configs" / "models" / f"{name}.yaml")
    problem = cluster_builder(model, load_cluster(cluster)).build([{module: [item(tokens)]}])
    found = problem.item(module, 0, 0)
    took = (found.forward_us, found.input_grad_us, found.weight_grad_us)
    assert took == pytest.approx(times_us, abs=ROUNDING_US)
    assert (found.activation_bytes, found.boundary_bytes) == (stored, passed)
    # Norms and biases are counted here alone.
    assert problem.module(module).layer_static_bytes == pytest.approx(weights, rel=0.005)
