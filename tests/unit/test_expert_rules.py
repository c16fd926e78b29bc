"""Which options for experts are refused, with the value, the rule and the remedy."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.configs import load_config
from megatron_dip.families.expert_rules import check_expert_arguments
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.integration.expert_rules import check_expert_plans

EXPERTS = {"num_experts": 4, "ffn_hidden_size": 32}
CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(
    folder: Path,
    *,
    experts: dict[str, int] | None = EXPERTS,
    tokens: int | None = None,
    **more: Any,
) -> FamilyConfig:
    """The tiny model with experts; ``tokens`` splits its language module."""
    data = yaml.safe_load((CONFIGS / "vlm_tiny.yaml").read_text())
    data["model"]["language"] |= {"experts": experts} | more
    schedule = data["schedule"]["modules"]["language"]
    schedule.pop("sub_microbatch_tokens", None)
    schedule |= {"sub_microbatch_tokens": tokens} if tokens else {}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_config(path)


def check(config: FamilyConfig, **values: Any) -> None:
    given = {"dip_schedule": True, "num_experts": 4, "moe_token_dispatcher_type": "alltoall"}
    args = argparse.Namespace(**(given | values))
    check_expert_arguments(args, "a.yaml", config)
    if args.dip_schedule and args.num_experts is not None:
        check_expert_plans(args, config.model_shape(), config.partition(2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "--moe-token-dispatcher-type flex does not work"),
        ({"moe_router_load_balancing_type": ["seq_aux_loss"]}, "seq_aux_loss .* 'aux_loss'"),
        (
            {"moe_token_dispatcher_type": "allgather", "expert_model_parallel_size": 2},
            "allgather .*--expert-model-parallel-size 2 .*use 'alltoall'",
        ),
    ],
)
def test_an_option_that_does_not_work_with_experts_is_refused_by_its_flag(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    config = config_of(tmp_path)
    check(config, moe_router_load_balancing_type=["aux_loss"], expert_model_parallel_size=2)
    with pytest.raises(UnsupportedError, match=message):
        check(config, **values)
    # Nothing to say where there are no experts.
    check(config, **values, num_experts=None)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"moe_aux_loss_coeff": [0.01]}, "--moe-aux-loss-coeff 0.01"),
        ({"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.001}, "--moe-z-loss-coeff 0.001"),
        (
            {"moe_aux_loss_coeff": 0.0, "moe_expert_capacity_factor": 1.0},
            "--moe-expert-capacity-factor",
        ),
    ],
)
def test_a_module_with_an_auxiliary_loss_is_not_split(
    tmp_path: Path, values: dict[str, Any], flag: str
) -> None:
    check(config_of(tmp_path), **values)
    split = config_of(tmp_path, tokens=96)
    check(split, moe_aux_loss_coeff=0.0)
    check(split, **values, dip_schedule=False)
    with pytest.raises(UnsupportedError, match=rf"{flag} .*96 of module language.*remove"):
        check(split, **values)


def plan_experts(config: FamilyConfig, **values: Any) -> None:
    """Any script's options for experts, under plans."""
    check_expert_plans(argparse.Namespace(**values), config.model_shape(), config.partition(2))


def test_balancing_over_replicas_is_refused_under_plans(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for name in ("seq_aux_loss", "sinkhorn", "quantile_balancing"):
        plan_experts(config, moe_router_load_balancing_type=name)
    with pytest.raises(UnsupportedError, match=r"global_aux_loss .*with --dip-schedule: every"):
        plan_experts(config, moe_router_load_balancing_type=["aux_loss", "global_aux_loss"])


@pytest.mark.parametrize("name", ["sinkhorn", "quantile_balancing"])
def test_routing_by_all_tokens_of_a_microbatch_needs_it_whole(tmp_path: Path, name: str) -> None:
    split = config_of(tmp_path, tokens=96)
    plan_experts(split, moe_router_load_balancing_type="none")
    with pytest.raises(UnsupportedError, match=f"{name} .*sub_microbatch_tokens 96.*all tokens"):
        plan_experts(split, moe_router_load_balancing_type=name)


def test_replicas_share_experts_by_what_takes_any_number_of_tokens(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    shared = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "flex"}
    plan_experts(config, **shared, moe_flex_dispatcher_backend="deepep")
    with pytest.raises(UnsupportedError, match=r"flex with --moe-flex-dispatcher-backend hybridep"):
        plan_experts(config, **shared, moe_flex_dispatcher_backend="hybridep")


def test_an_auxiliary_loss_that_megatron_would_scale_wrongly_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    values = {"moe_aux_loss_coeff": 0.01, "calculate_per_token_loss": True}
    check(config, **values, tensor_model_parallel_size=1)
    check(config, moe_aux_loss_coeff=0.01, tensor_model_parallel_size=2)
    with pytest.raises(UnsupportedError, match=r"0.01 .*--tensor-model-parallel-size 2: leave"):
        check(config, **values, tensor_model_parallel_size=2)


def test_a_frozen_module_is_not_shared_by_replicas(tmp_path: Path) -> None:
    frozen = config_of(tmp_path, trainable=False)
    check(frozen)
    refused = r"first layers of the language module.*use 1, or train its embedding"
    with pytest.raises(UnsupportedError, match=refused):
        check(frozen, expert_model_parallel_size=2)
    with pytest.raises(UnsupportedError, match=refused):
        check(config_of(tmp_path, trainable=["head"]), expert_model_parallel_size=2)
    check(config_of(tmp_path, trainable=["embedding"]), expert_model_parallel_size=2)


def test_experts_are_stated_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--num-experts 4 .*a\.yaml.*model\.language\.experts"):
        check(config_of(tmp_path, experts=None))
    arguments = config_of(tmp_path).megatron_arguments()
    assert arguments["num_experts"] == 4
    assert arguments["moe_router_topk"] == 2
    assert arguments["moe_ffn_hidden_size"] == 32
    with pytest.raises(ConfigError, match="top_k 5 is above num_experts 4"):
        config_of(tmp_path, experts=EXPERTS | {"top_k": 5})
