"""Which runs may move samples between microbatches and replicas."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dip.errors import ConfigError, DipError, UnsupportedError
from megatron_dip.families.assignment_rules import check_assignment
from megatron_dip.families.configs import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
PER_TOKEN = {"calculate_per_token_loss": True}


def check(folder: Path, moves: str, name: str = "vlm_tiny", gates: str = "", **args: Any) -> None:
    form = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    form["schedule"]["assignment"] = moves
    if gates:
        form["model"].setdefault("adapter", {})["gates"] = gates
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump(form))
    given = {"dataloader_type": None, "calculate_per_token_loss": False, "num_experts": None}
    check_assignment(Namespace(**given | args), "a.yaml", load_config(path))


@pytest.mark.parametrize(
    ("moves", "args"),
    [
        ("none", {"dataloader_type": "cyclic"}),
        ("microbatches", {"num_experts": 4, "moe_aux_loss_coeff": 0.01}),
        ("samples", PER_TOKEN),
        ("samples", PER_TOKEN | {"num_experts": 4, "moe_aux_loss_coeff": 0.0}),
    ],
)
def test_what_leaves_the_gradients_as_they_are_is_accepted(
    tmp_path: Path, moves: str, args: dict[str, Any]
) -> None:
    check(tmp_path, moves, **args)


@pytest.mark.parametrize(
    ("error", "message", "more"),
    [
        (ConfigError, "the mean of the means of microbatches", {}),
        (UnsupportedError, "--dataloader-type cyclic", PER_TOKEN | {"dataloader_type": "cyclic"}),
        (
            ConfigError,
            "--moe-aux-loss-coeff 0.01, which is taken over all tokens of a microbatch",
            PER_TOKEN | {"num_experts": 4, "moe_aux_loss_coeff": 0.01},
        ),
        (
            ConfigError,
            "--moe-expert-capacity-factor 2, which",
            PER_TOKEN | {"num_experts": 4, "moe_expert_capacity_factor": 2.0},
        ),
        (
            ConfigError,
            "gates public_code, by which a sample depends on the others",
            PER_TOKEN | {"name": "lavin_tiny", "gates": "public_code"},
        ),
    ],
)
def test_what_would_train_something_else_is_refused_with_the_reason(
    tmp_path: Path, error: type[DipError], message: str, more: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"a.yaml: schedule.assignment samples does not .*{message}"):
        check(tmp_path, "samples", **more)
