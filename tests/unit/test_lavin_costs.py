"""Frozen layers with adapters in the cost model: what is trained, timed and stored."""

from pathlib import Path

import pytest

from megatron_dip.costs import ClusterConfig, ItemSize, cluster_builder, load_model
from megatron_dip.costs.shapes import AdapterShape, ModelShape
from megatron_dip.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGE = ItemSize(tokens=257, spans=(257,))


def model(name: str = "lavin_7b") -> ModelShape:
    """A model of ``configs``."""
    return load_model(CONFIGS / "models" / f"{name}.yaml")


def fully_tuned() -> ModelShape:
    """The same towers, trained as a whole."""
    adapter = AdapterShape(tunes_layers=True)
    modules = [m.model_copy(update={"adapter": adapter}) for m in model().modules]
    return model().model_copy(update={"modules": tuple(modules)})


def problem(shape: ModelShape, *, num_images: int = 1):
    """One microbatch of four padded samples, ``num_images`` of them with an image."""
    cluster = ClusterConfig(
        name="a100",
        gpu="A100",
        num_gpus=8,
        pipeline_parallel=2,
        sequence_parallel=False,
        distributed_optimizer=False,
    )
    text = [
        ItemSize(tokens=512, spans=(512,), needs={"vision": (n,) if n < num_images else ()})
        for n in range(4)
    ]
    microbatch = {"vision": [IMAGE] * num_images, "language": text}
    return cluster_builder(shape, cluster).build([microbatch])


@pytest.mark.parametrize(("name", "trained"), [("lavin_7b", 3_781_296), ("lavin_13b", 5_390_080)])
def test_shapes_have_the_published_number_of_tuned_parameters(name: str, trained: int):
    assert model(name).num_trained_parameters() == trained


def test_the_towers_are_counted_with_their_adapters():
    # LLaMA-7B has 6,738,415,616 parameters.
    language = model().module("language")
    tuned = language.num_trained_parameters()
    assert language.num_parameters() - tuned == 6_738_415_616


@pytest.mark.parametrize("module", ["vision", "language"])
def test_a_frozen_layer_with_an_adapter_costs_its_input_gradient_and_little_more(module: str):
    (frozen,) = problem(model()).items(module, 0)[:1]
    (full,) = problem(fully_tuned()).items(module, 0)[:1]
    assert frozen.forward_us == full.forward_us
    assert frozen.input_grad_us == full.input_grad_us
    assert frozen.input_grad_us == pytest.approx(frozen.forward_us, rel=0.25)
    assert 0 < frozen.weight_grad_us < 0.1 * full.weight_grad_us
    step = frozen.forward_us + frozen.input_grad_us + frozen.weight_grad_us
    whole = full.forward_us + full.input_grad_us + full.weight_grad_us
    # Two thirds where all is linear layers; kernels that only move bytes have no weight gradient.
    assert 0.6 < step / whole < 0.75


def test_embedding_head_and_patches_are_frozen_too():
    frozen, full = problem(model()), problem(fully_tuned())
    for module in ("vision", "language"):
        for end in ("first", "last"):
            name = f"{end}_extra_weight_grad_us"
            assert getattr(frozen.items(module, 0)[0], name) == 0
            if (module, end) != ("vision", "last"):
                assert getattr(full.items(module, 0)[0], name) > 0


def test_frozen_weights_have_neither_gradient_nor_optimizer_state():
    frozen, full = problem(model()).module("language"), problem(fully_tuned()).module("language")
    shape = model().module("language")
    weights = shape.layer_linear_parameters() + shape.layer_other_parameters()
    assert frozen.layer_static_bytes == 2 * weights + 18 * shape.adapter_parameters()
    assert full.layer_static_bytes == pytest.approx(18 * weights, rel=0.01)
    activation = problem(model()).items("language", 0)[0].activation_bytes
    assert activation < problem(fully_tuned()).items("language", 0)[0].activation_bytes


def test_samples_without_images_have_no_work_in_the_encoder():
    assert problem(model(), num_images=0).items("vision", 0) == ()
    assert len(problem(model(), num_images=3).items("vision", 0)) == 3


def test_rows_of_another_width_than_the_neck_reads_are_refused():
    modules = model().modules
    narrow = modules[0].model_copy(update={"hidden_size": 768, "num_attention_heads": 12})
    data = {"name": "x", "modules": [narrow.model_dump(), modules[1].model_dump()]}
    with pytest.raises(ConfigError, match=r"neck\.input_size: 1024, but vision gives rows of 768"):
        ModelShape.parse(data, ConfigError)
