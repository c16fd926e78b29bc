"""Adapters alone on disk: size, round trip, other towers, and released checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lavin_setup import (
    clip_stages,
    language_stages,
    loss_of,
    microbatch,
    move_adapters,
    published_stages,
    step,
)
from models_setup import base_config, megatron_on_cpu
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.errors import CheckpointError
from megatron_dip.families.configs import load_config
from megatron_dip.families.lavin.adapter_file import write_adapters
from megatron_dip.families.lavin.checkpoint import (
    base_digest,
    gather_adapters,
    load_adapters,
    save_adapters,
)
from megatron_dip.families.lavin.model import LavinStages
from megatron_dip.families.lavin.released import from_released, to_released
from megatron_dip.families.packed.initialization import named_global_parameters


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


@pytest.fixture(scope="module")
def base(_megatron):
    return base_config(torch.float32)


def make_stages(base, cuts=((), ()), *, moved=False):
    stages = [*clip_stages(base, cuts[0]), *language_stages(base, cuts[1])]
    if moved:
        move_adapters(stages)
    return stages


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def change(path, **changes):
    torch.save(torch.load(path) | changes, path)


@pytest.mark.parametrize("released", [False, True])
def test_adapters_come_back_under_another_cut(base, tmp_path, released):
    saved = make_stages(base, moved=True)
    save_adapters(tmp_path / "adapters.pt", saved, released=released)
    loaded = make_stages(base, ((1, 3), (2,)))
    load_adapters(tmp_path / "adapters.pt", loaded)
    assert_same(gather_adapters(loaded), gather_adapters(saved))


def test_all_adapters_of_7b_take_at_most_16_mb(tmp_path):
    stages = published_stages(4096, 32, 11008, 32)
    adapters = {
        name: torch.zeros(parameter.shape)
        for stage in stages
        for name, parameter in named_global_parameters(stage)
        if parameter.requires_grad
    }
    write_adapters(tmp_path / "adapters.pt", adapters, "0" * 64)
    size = (tmp_path / "adapters.pt").stat().st_size
    assert 4 * 3_781_296 < size <= 16e6


def test_adapters_of_other_towers_are_refused_and_nothing_is_changed(base, tmp_path):
    save_adapters(tmp_path / "adapters.pt", make_stages(base, moved=True))
    others = make_stages(base)
    others[1].language_model.decoder.layers[2].mlp.linear_fc1.weight.data[3, 4] += 0.1
    before = gather_adapters(others)
    with pytest.raises(CheckpointError, match=r"adapters\.pt: .* tuned for other towers"):
        load_adapters(tmp_path / "adapters.pt", others)
    assert_same(gather_adapters(others), before)


def test_the_identity_of_towers_is_that_of_their_weights(base):
    stages = make_stages(base)
    assert base_digest(make_stages(base, ((2,), (1,)), moved=True)) == base_digest(stages)
    assert base_digest(make_stages(base_config(torch.bfloat16))) == base_digest(stages)


def test_missing_and_misshapen_adapters_are_named(base, tmp_path):
    path = tmp_path / "adapters.pt"
    stages = make_stages(base, moved=True)
    save_adapters(path, stages)
    adapters = torch.load(path)["adapters"]
    name = "vision_model.decoder.layers.3.input_layernorm.adapter.up.bias"
    change(path, adapters={key: value for key, value in adapters.items() if key != name})
    with pytest.raises(CheckpointError, match="lacks 1 parameters: " + name):
        load_adapters(path, stages)
    change(path, adapters=adapters | {name: adapters[name][:, :4]})
    with pytest.raises(CheckpointError, match=r"up\.bias has shape \[2, 4\] .*\[2, 32\]"):
        load_adapters(path, stages)
    change(path, adapters=adapters | {"adapter_extra": adapters[name]})
    with pytest.raises(CheckpointError, match="beside this model's, 1 parameters: adapter_extra"):
        load_adapters(path, stages)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ({"weights": {}}, "neither adapters"), ([1], "holds a list")],
)
def test_files_that_are_no_adapters_are_refused(base, tmp_path, content, message):
    if content is not None:
        torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        load_adapters(tmp_path / "file.pt", make_stages(base))


def test_released_names_and_shapes_are_those_of_the_released_code(base):
    released = to_released(gather_adapters(make_stages(base, moved=True)))
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    block = {
        "conv_A.weight": (8, 48, 1),
        "conv_A.bias": (8,),
        "conv_B.weight": (48, 4, 1),
        "conv_B.bias": (48,),
        "conv_D.weight": (48, 4, 1),
        "conv_D.bias": (48,),
        "expert_weights.weight": (2, 48),
        "expert_weights.bias": (2,),
    }
    for layer in range(4):
        for name, shape in block.items():
            assert shapes.pop(f"layers.{layer}.adapter_attn.{name}") == shape
            narrow = tuple(32 if size == 48 else size for size in shape)
            prefix = f"backbone.visual.transformer.resblocks.{layer}.adapter_attn"
            assert shapes.pop(f"{prefix}.{name}") == narrow
    assert shapes == {
        "adapter_modality_embedding.weight": (2, 48),
        "adapter_proj.conv_A.weight": (16, 32),
        "adapter_proj.conv_A.bias": (16,),
        "adapter_proj.conv_B.weight": (48, 16),
        "adapter_proj.conv_B.bias": (48,),
    }


def test_a_released_checkpoint_written_under_data_parallelism_trains_on(base, tmp_path):
    double = base_config()
    adapters = gather_adapters(make_stages(double, moved=True))
    released = {f"module.{name}": tensor for name, tensor in to_released(adapters).items()}
    released["module.layers.0.attention.wq.weight"] = torch.zeros(1)
    torch.save({"model": released, "epoch": 19}, tmp_path / "checkpoint-19.pth")
    stages = make_stages(double)
    load_adapters(tmp_path / "checkpoint-19.pth", stages)
    assert_same(gather_adapters(stages), adapters)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.1.adapter_attn.conv_D.bias", r"layers\.1.*only \['conv_B'\]"),
        ("backbone.visual.transformer.resblocks.0.adapter_attn.conv_C.bias", "not an adapter"),
    ],
)
def test_released_checkpoints_with_other_names_are_refused(base, name, message):
    released = to_released(gather_adapters(make_stages(base)))
    if name in released:
        del released[name]
    else:
        released[name] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=message):
        from_released(released, "file")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(48, 3, 1), r"two experts of .*up\.weight have shapes"),
        (5, r"conv_D\.weight is a int, not a tensor"),
    ],
)
def test_a_damaged_expert_of_a_released_checkpoint_is_named(base, value, message):
    released = to_released(gather_adapters(make_stages(base)))
    released["layers.1.adapter_attn.conv_D.weight"] = value
    with pytest.raises(CheckpointError, match=message):
        from_released(released, "file")


def test_the_command_exports_what_released_code_and_this_package_read(base, tmp_path):
    saved = make_stages(base, moved=True)
    save_adapters(tmp_path / "adapters.pt", saved)
    exported = tmp_path / "new" / "checkpoint.pth"
    command = ["export-adapters", str(tmp_path / "adapters.pt"), "-o", str(exported)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    adapters = gather_adapters(saved)
    count = sum(tensor.numel() for tensor in adapters.values())
    assert result.output == f"wrote {exported} ({count} adapter parameters)\n"
    released = torch.load(exported)["model"]
    assert released["adapter_proj.conv_A.weight"].shape == (16, 32)
    assert released["layers.0.adapter_attn.conv_A.weight"].shape == (8, 48, 1)
    loaded = make_stages(base)
    load_adapters(exported, loaded)
    assert_same(gather_adapters(loaded), adapters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ({"model": {}}, "has the released form already"),
        ({"format": "megatron-dip/lavin-adapters", "version": 2}, "version 2 of adapters"),
        ({"format": "megatron-dip/lavin-adapters", "version": 1}, "the file is damaged"),
    ],
)
def test_the_command_says_in_one_line_what_cannot_be_exported(tmp_path, content, message):
    if content is not None:
        torch.save(content, tmp_path / "file.pt")
    command = ["export-adapters", str(tmp_path / "file.pt"), "-o", str(tmp_path / "out.pth")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()


def test_every_norm_of_a_tower_has_the_epsilon_of_its_configuration(base):
    config = load_config(Path(__file__).parents[2] / "configs" / "lavin_tiny.yaml")
    stages = LavinStages(config, base, 1)
    layers = {"first_layer": 0, "num_layers": 2, "first": True, "last": True}
    for module, expected in (("vision", 1e-5), ("language", 1e-6)):
        stage = stages.construct(module, **layers)
        found = [part.eps for part in stage.modules() if hasattr(part, "eps")]
        assert found == [expected] * 5, module


def test_a_missing_key_of_a_released_checkpoint_is_named(base, tmp_path):
    """The released code loads such a file without a word."""
    released = to_released(gather_adapters(make_stages(base)))
    del released["adapter_proj.conv_A.bias"]
    torch.save({"model": released}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"lacks 1 parameters: adapter_neck\.inner\.bias"):
        load_adapters(tmp_path / "released.pth", make_stages(base))


def test_loaded_adapters_do_what_the_saved_ones_did(base, tmp_path):
    double = base_config()
    batch = microbatch()
    expected = step(double, batch)[0]
    save_adapters(tmp_path / "adapters.pt", make_stages(base, moved=True))
    stages = make_stages(replace(base))
    load_adapters(tmp_path / "adapters.pt", stages)
    losses = loss_of(stages[:1], stages[1:], batch)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
