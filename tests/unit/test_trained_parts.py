"""What a configuration says is trained, and what costs make of it."""

import pytest
import yaml
from cost_cases import ROOT, causal, dit, item, times, vit

from megatron_dip.costs.builder import ProblemBuilder
from megatron_dip.costs.layers import Parallelism
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.costs.shapes import ModelShape, ModuleShape, ProjectorShape
from megatron_dip.costs.trained_parts import LayerChoice, trained_parts
from megatron_dip.errors import ConfigError
from megatron_dip.families.configs import load_config
from megatron_dip.workload import TransferCost

PARTS = ("embedding", "layers", "norm", "projector")
MEMORY = MemoryModel(parallel=Parallelism())


@pytest.mark.parametrize(
    ("trainable", "parts", "layers"),
    [
        (True, set(PARTS), [range(6)]),
        (False, set(), []),
        (("projector",), {"projector"}, []),
        (("tower",), {"embedding", "layers", "norm"}, [range(6)]),
        ({"tower": False, "projector": True}, {"projector"}, []),
        ({"layers": LayerChoice(last=2)}, {"layers"}, [range(4, 6)]),
        ({"layers": LayerChoice(first=1, last=2)}, {"layers"}, [range(1), range(4, 6)]),
        ({"layers": LayerChoice(first=3, last=3)}, {"layers"}, [range(6)]),
        ({"norm": True, "layers": LayerChoice()}, {"norm"}, []),
    ],
)
def test_parts_are_named_in_several_ways(trainable, parts, layers):
    found = trained_parts(trainable, PARTS, 6)
    assert (found.parts, list(found.layers)) == (parts, layers)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (("head",), "'head' .expected some of the module's parts: .*'projector', 'tower'"),
        ((), "names no part that is trained"),
        ({"embedding": False}, "names no part that is trained"),
        ({"tower": True, "norm": True}, "norm twice"),
        ({"layers": LayerChoice(last=7)}, "last 7 of 6 layers"),
        ({"norm": LayerChoice(last=1)}, "trainable.norm: expected true or false"),
    ],
)
def test_odd_parts_are_refused(trainable, message):
    with pytest.raises(ValueError, match=message):
        trained_parts(trainable, PARTS, 6)


def written(tmp_path, name, **fields):
    """A shipped configuration with fields of modules changed, in a file."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    for module, changed in fields.items():
        config["model"][module] |= changed
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "vlm_tiny.yaml",
            {"vision": {"trainable": "projector"}},
            "vision.trainable: expected true",
        ),
        ("vlm_tiny.yaml", {"vision": {"trainable": ["neck"]}}, "names 'neck'"),
        ("vlm_tiny.yaml", {"vision": {"trainable": {"layers": {"middle": 1}}}}, "middle"),
        ("t2v_tiny.yaml", {"text": {"trainable": ["head"]}}, "names 'head'"),
        (
            "vlm_tiny.yaml",
            {"vision": {"trainable": False}, "language": {"trainable": False}},
            "nothing is trained, vision and language are frozen",
        ),
        (
            "vlm_tiny.yaml",
            {"vision": {"trainable": False, "learning_rate_factor": 2.0}},
            "nothing in the module is trained",
        ),
        (
            "vlm_tiny.yaml",
            {"vision": {"trainable": ["norm"], "learning_rate_factor": {"projector": 2.0}}},
            "learning_rate_factor names projector, which is not trained",
        ),
        ("vlm_tiny.yaml", {"vision": {"learning_rate_factor": 0.0}}, "learning_rate_factor"),
    ],
)
def test_what_a_configuration_cannot_mean_is_one_line(tmp_path, name, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(written(tmp_path, name, **fields))
    assert "\n" not in str(caught.value)


def test_factors_are_by_part(tmp_path):
    factors = {"tower": 0.1, "projector": 10.0}
    config = load_config(
        written(tmp_path, "vlm_tiny.yaml", vision={"learning_rate_factor": factors})
    )
    forms = config.module_forms()
    assert forms["vision"].learning_rate_factors == {
        "embedding": 0.1,
        "layers": 0.1,
        "norm": 0.1,
        "projector": 10.0,
    }
    assert set(forms["language"].learning_rate_factors.values()) == {1.0}


def problem(*modules: ModuleShape):
    builder = ProblemBuilder(
        model=ModelShape(name="model", modules=modules),
        times=times(),
        memory=MEMORY,
        num_ranks=1,
        memory_limit_bytes=10**12,
        transfer=TransferCost(latency_us=0.0, bytes_per_us=1.0),
    )
    return builder.build([{module.name: [item(64)] for module in modules}])


PROJECTOR = ProjectorShape(intermediate_size=32, output_size=8)


def test_a_projector_alone_has_the_backward_of_its_second_layer():
    whole = problem(vit(projector=PROJECTOR), causal(upstream=("vision",)))
    alone = problem(
        vit(projector=PROJECTOR, trainable=("projector",)),
        causal(upstream=("vision",), trainable=False),
    )
    assert whole.modules[0].last_layer_extra.trainable is None
    vision = alone.modules[0]
    assert (vision.trainable, vision.trained_layers) == (True, ())
    assert vision.first_layer_extra.trainable is False
    assert alone.first_with_backward == {"vision": vision.num_layers, "language": -1}
    image, trained = alone.items("vision", 0)[0], whole.items("vision", 0)[0]
    assert image.input_grad_us == image.weight_grad_us == image.first_extra_weight_grad_us == 0.0
    assert 0 < image.last_extra_input_grad_us < trained.last_extra_input_grad_us
    assert image.last_extra_weight_grad_us == trained.last_extra_weight_grad_us > 0
    sequence = alone.items("language", 0)[0]
    assert sequence.input_grad_us > 0 and sequence.weight_grad_us == 0.0
    assert sequence.last_extra_weight_grad_us == 0.0


def test_weights_cost_what_their_part_does():
    frozen = vit(projector=PROJECTOR, trainable=False)
    whole = vit(projector=PROJECTOR)
    model = MEMORY
    for part in PARTS:
        one = vit(projector=PROJECTOR, trainable=(part,))
        weights = {
            "embedding": one.first_parameters(),
            "layers": one.num_layers * one.layer_parameters(),
        } | one.last_part_parameters()
        assert one.num_trained_parameters() == weights[part]
        more = model.bytes_per_weight(trainable=True) - model.bytes_per_weight(trainable=False)

        def total(module):
            layers = module.num_layers * model.layer_static_bytes(module)
            return layers + model.first_static_bytes(module) + model.last_static_bytes(module)

        assert total(one) - total(frozen) == pytest.approx(more * weights[part], abs=4)
    assert whole.num_trained_parameters() == whole.num_parameters()


def test_some_layers_cost_what_they_are():
    layers = {"layers": LayerChoice(last=1)}
    module = problem(vit(trainable=layers, num_layers=3), causal(upstream=("vision",))).modules[0]
    assert module.trained_layers == ((2, 3),)
    assert module.frozen_layer_static_bytes is not None
    assert module.frozen_layer_static_bytes < module.layer_static_bytes


def test_parts_of_a_diffusion_transformer_are_its_own():
    text = causal(name="text", has_head=False, trainable=False)
    found = problem(text, dit(upstream=("text",), trainable=("text_projection",)))
    dit_module, clip = found.modules[1], found.items("dit", 0)[0]
    assert (dit_module.trained_layers, dit_module.first_layer_extra.trainable) == ((), None)
    assert dit_module.last_layer_extra.trainable is False
    assert clip.input_grad_us > 0 == clip.weight_grad_us
    assert found.first_with_backward == {"dit": -1}
