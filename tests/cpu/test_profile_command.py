"""Measured profiles: from a configuration to the times that plans are made from."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny_vlm import write_config
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.costs import ItemSize, Kernels, ProblemBuilder, config_builder, load_profile
from megatron_dip.errors import ConfigError
from megatron_dip.families.configs import load_config
from megatron_dip.runtime.measure import StoredBytes, measure_call


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def test_a_profile_of_every_module_is_measured_and_planned_from(tmp_path):
    config = write_config(tmp_path / "tiny.yaml", tmp_path, num_ranks=2)
    done = run(config, "-o", tmp_path / "p.json", "--device", "cpu", "--points", 3,
               "--time-limit", 6)  # fmt: skip
    assert done.exit_code == 0, done.output
    profile = load_profile(tmp_path / "p.json")
    assert profile.precision == "fp32"
    assert set(profile.modules) == {"vision", "language"}
    for module in profile.modules.values():
        smallest, largest = module.linear[0], module.linear[-1]
        assert largest.size > smallest.size
        for point in (smallest, largest):
            # Others are differences of times, which what else the machine does may make 0.
            assert point.forward_us > 0
            assert point.recompute_us is not None
        per_token = smallest.activation_bytes / smallest.size
        assert largest.activation_bytes == per_token * largest.size

    data = yaml.safe_load(config.read_text())
    data["schedule"]["costs"] = {"profile": "p.json"}
    config.write_text(yaml.safe_dump(data))
    builder = builder_of(config, Kernels(is_fp32=True))
    size = ItemSize(tokens=48, spans=(48,))
    item = builder.build([{"vision": [size], "language": [size]}]).items("vision", 0)[0]
    vision = profile.modules["vision"]
    at_48 = vision.linear[-1]
    assert at_48.size == 48
    # A larger size never takes less: what was measured of a smaller one counts where it took more.
    linear, core = (max(p.forward_us for p in part) for part in (vision.linear, vision.attention))
    assert item.forward_us == pytest.approx(linear - vision.overhead_us + core)
    assert item.activation_bytes == at_48.activation_bytes
    with pytest.raises(ConfigError, match="precision is fp32, but the run is in bf16"):
        builder_of(config, Kernels())


def builder_of(path: Path, kernels: Kernels) -> ProblemBuilder:
    config = load_config(path)
    num_ranks = config.schedule.num_ranks
    assert num_ranks is not None
    return config_builder(
        config.schedule,
        config.model_shape(),
        config.partition(num_ranks),
        num_ranks=num_ranks,
        kernels=kernels,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--points", "1"), "--points 1: expected at least 2"),
        (("--repetitions", "0"), "--repetitions 0: expected a number above 0"),
        (("--sequence-parallel",), "--sequence-parallel: expected --tensor-parallel above 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(tmp_path, options, message):
    config = write_config(tmp_path / "tiny.yaml", tmp_path, num_ranks=2)
    done = run(config, "-o", tmp_path / "p.json", "--device", "cpu", *options)
    assert done.exit_code == 2
    assert message in done.output


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = write_config(tmp_path / "tiny.yaml", tmp_path, num_ranks=2)
    done = run(config, "-o", tmp_path / "p.json")
    assert done.exit_code == 2
    assert "this machine has 0 GPUs, 1 needed (--device cpu" in done.output


def test_kept_bytes_count_every_memory_once_until_its_backward():
    weight = torch.ones(8, 8, requires_grad=True)
    inputs = torch.ones(4, 8, requires_grad=True)
    counter = StoredBytes([weight])
    with counter.counting():
        # exp keeps its result, which the product keeps as well; the weight is a parameter.
        output = (inputs.exp() @ weight).sum()
    assert counter.held == counter.peak == 4 * 8 * 4
    output.backward()
    assert (counter.held, counter.peak) == (0, 4 * 8 * 4)


def test_times_tell_inputs_from_weights_and_large_from_small():
    """By their work they are so far apart that a busy machine cannot hide it."""
    large, constant = torch.randn(512, 512), torch.randn(512, 512)

    def measured(inputs, weight, call):
        inputs, weight = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
        times = measure_call(
            lambda: call(inputs, weight),
            inputs=[inputs],
            parameters=[weight],
            device=torch.device("cpu"),
            repetitions=9,
            seconds=2.0,
        )
        assert weight.requires_grad
        return times

    # The product is of one of them alone, the other one is added to it.
    of_inputs = measured(large, large, lambda inputs, weight: inputs @ constant + weight)
    of_weight = measured(large, large, lambda inputs, weight: weight @ constant + inputs)
    assert of_inputs.input_grad_us > 4 * of_weight.input_grad_us > 0
    assert of_weight.weight_grad_us > 2 * of_inputs.weight_grad_us
    small = measured(large[:8, :8], constant[:8, :8], lambda inputs, weight: inputs @ weight)
    assert of_inputs.forward_us > 20 * small.forward_us > 0
