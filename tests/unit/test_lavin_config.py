"""The configuration of LaVIN: the published schedule, and what is refused."""

from pathlib import Path

import pytest
import yaml

from megatron_dip.errors import ConfigError
from megatron_dip.families.configs import load_config
from megatron_dip.families.lavin.config import LavinConfig, PublishedOptimizer

TINY = Path(__file__).resolve().parents[2] / "configs" / "lavin_tiny.yaml"


def changed(tmp_path: Path, change: object) -> Path:
    """The tiny configuration, changed by ``change(data)``."""
    data = yaml.safe_load(TINY.read_text())
    change(data)  # type: ignore[operator]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "config.yaml"


def test_the_tiny_configuration_is_of_this_family():
    config = load_config(TINY)
    assert isinstance(config, LavinConfig)
    assert config.data.image_folder == TINY.parent / "../runs/scienceqa/images"
    assert config.num_layers() == {"vision": 6, "language": 8}
    assert "lr" not in config.megatron_arguments()


def test_the_published_schedule_is_that_of_20_epochs():
    arguments = PublishedOptimizer().megatron_arguments()
    assert arguments["lr"] == pytest.approx(1.125e-3)
    assert arguments["train_iters"] == 20 * 397 == arguments["lr_decay_iters"]
    assert arguments["lr_warmup_iters"] == 2 * 397
    assert (arguments["adam_beta1"], arguments["adam_beta2"]) == (0.9, 0.95)
    assert (arguments["weight_decay"], arguments["clip_grad"]) == (0.02, 0.0)
    assert (arguments["min_lr"], arguments["lr_decay_style"]) == (0.0, "cosine")


def test_the_optimizer_of_the_file_becomes_arguments(tmp_path: Path):
    path = changed(tmp_path, lambda data: data.update(optimizer={"num_epochs": 15}))
    assert load_config(path).megatron_arguments()["train_iters"] == 15 * 397


def test_each_tower_has_its_own_published_epsilon_of_norms(tmp_path: Path):
    config = load_config(TINY)
    assert (config.model.vision.norm_epsilon, config.model.language.norm_epsilon) == (1e-5, 1e-6)
    # Megatron's flag is one for all modules: stated otherwise it contradicts the file.
    assert config.megatron_arguments()["norm_epsilon"] == 1e-6
    path = changed(tmp_path, lambda data: data["model"]["language"].update(norm_epsilon=1e-5))
    assert load_config(path).megatron_arguments()["norm_epsilon"] == 1e-5


@pytest.mark.parametrize("name", ["vlm_tiny", "omni_tiny", "t2v_tiny"])
def test_elsewhere_the_flag_decides_unless_the_file_does(tmp_path: Path, name: str):
    data = yaml.safe_load(TINY.with_name(f"{name}.yaml").read_text())
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    assert "norm_epsilon" not in load_config(path).megatron_arguments()
    last = "dit" if name == "t2v_tiny" else "language"
    data["model"][last]["norm_epsilon"] = 2e-6
    path.write_text(yaml.safe_dump(data))
    assert load_config(path).megatron_arguments()["norm_epsilon"] == 2e-6


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision", {"feature_layers": [2, 7]}, r"feature_layers \[2, 7\]"),
        ("vision", {"feature_layers": [2, 1]}, r"feature_layers \[2, 1\]"),
        ("vision", {"image_size": 100}, "image_size 100 is not a multiple of patch_size 14"),
        ("language", {"trainable": False}, "trainable is not for this family"),
        ("vision", {"trainable": ["norm"]}, "trainable is not for this family"),
        ("vision", {"learning_rate_factor": {"norm": 2.0}}, "expected one number"),
        ("adapter", {"num_groups": 3}, "adapter.bottleneck 8 is not a multiple"),
        ("adapter", {"gates": "batch"}, "model.adapter.gates"),
        ("vision", {"norm_epsilon": 0}, "model.vision.norm_epsilon"),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path: Path, section, values, message):
    path = changed(tmp_path, lambda data: data["model"][section].update(values))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_released_router_needs_whole_microbatches_of_images(tmp_path: Path):
    def change(data):
        data["model"]["adapter"]["gates"] = "public_code"
        data["schedule"]["modules"]["vision"]["sub_microbatch_tokens"] = 257

    with pytest.raises(ConfigError, match=r"vision\.sub_microbatch_tokens does not work"):
        load_config(changed(tmp_path, change))
