"""What would have no effect is refused where it is stated, and nothing where it is not."""

from typing import Any

import pytest
from planning_cases import chain_case
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.config import CostConfig, DipConfig, PlanningConfig, ScheduleConfig
from megatron_dip.errors import ConfigError
from megatron_dip.integration.options import DipOptions

FALLBACK = {"planner": "one_f_one_b"}
ONE_PLAN = {"plan": "all.json"}
NO_SEARCH = {"evaluations": 0}
PROFILE = {"costs": {"profile": "profile.json"}}


@pytest.mark.parametrize(
    ("schedule", "more", "named"),
    [
        (FALLBACK, {"schedule": {"evaluations": 64}}, "['evaluations'] beside planner"),
        (
            FALLBACK,
            {"schedule": {"offload": {"link_gb_per_s": 50, "host_memory_gib": 1}}},
            "['offload'] beside planner one_f_one_b",
        ),
        (FALLBACK, {"planning": {"searches": 1}}, "['planning.searches'] beside"),
        (FALLBACK, {"planning": {"search_limit_ms": 9}}, "['planning.search_limit_ms'] beside"),
        (ONE_PLAN, {"schedule": {"planner": "dual_queue"}}, "['planner'] beside plan"),
        (ONE_PLAN, {"schedule": {"evaluations": 64}}, "['evaluations'] beside plan"),
        (ONE_PLAN, {"planning": {"searches": 2}}, "beside schedule.plan"),
        (ONE_PLAN, {"planning": {"search_limit_ms": 9}}, "beside schedule.plan"),
        (NO_SEARCH, {"planning": {"searches": 2}}, "beside schedule.evaluations 0"),
        (NO_SEARCH, {"planning": {"search_limit_ms": 9}}, "beside schedule.evaluations 0"),
        (
            PROFILE,
            {"schedule": {"costs": {**PROFILE["costs"], "flops_per_us": 4e8}}},
            "['costs.flops_per_us'] beside costs.profile",
        ),
        (
            PROFILE,
            {"schedule": {"costs": {**PROFILE["costs"], "layer_overhead_us": 60}}},
            "['costs.layer_overhead_us'] beside costs.profile",
        ),
        (
            PROFILE,
            {"schedule": {"modules": {"vision": {"flops_per_us": 1e6}}}},
            "['modules.vision.flops_per_us'] beside costs.profile",
        ),
    ],
)
def test_a_key_without_effect_is_refused_at_any_value(
    schedule: dict[str, Any], more: dict[str, Any], named: str
) -> None:
    given = {"schedule": schedule | more.get("schedule", {}), "planning": more.get("planning", {})}
    DipConfig.parse({"schedule": schedule}, ConfigError)
    with pytest.raises(ConfigError) as refused:
        DipConfig.parse(given, ConfigError)
    assert named in str(refused.value)
    # What to do instead.
    assert "(" in str(refused.value)


def test_every_key_beside_a_planner_that_searches_is_taken() -> None:
    planning = PlanningConfig()
    everything = {
        "schedule": {"planner": "dual_queue", "evaluations": 64, "costs": {"flops_per_us": 1e6}},
        "planning": planning.model_dump() | {"searches": 2, "search_limit_ms": 5.0},
    }
    assert DipConfig.parse(everything, ConfigError).planning.searches == 2
    beside = {"schedule": FALLBACK, "planning": {"search_limit_ms": None, "workers": 2}}
    assert DipConfig.parse(beside, ConfigError).planning.workers == 2


def test_who_adds_a_key_looks_whether_every_planner_reads_it() -> None:
    """Every planner reads these, or the table above has those that do not."""
    assert set(PlanningConfig.model_fields) == {
        *("look_ahead", "workers", "wait_limit_ms", "worker_memory_gib"),
        *("searches", "search_limit_ms"),
    }
    assert set(ScheduleConfig.model_fields) == {
        *("num_ranks", "split_backward", "partition", "modules", "hardware_queues", "plan"),
        *("assignment", "memory_limit_gib", "costs", "planner", "evaluations", "offload"),
    }
    assert set(CostConfig.model_fields) == {
        *("profile", "flops_per_us", "layer_overhead_us", "transfer_latency_us"),
        *("transfer_bytes_per_us", "feedback"),
    }


def test_parts_are_not_varied_under_one_plan_for_all_batches() -> None:
    config = DipConfig.parse({"schedule": ONE_PLAN}, ConfigError)
    with pytest.raises(ConfigError, match=r"--dip-vary-parts .* schedule\.plan"):
        DipOptions(config=config, vary_parts=True)


PLAN = ("plan", "--problem", "problem.json", "--partition", "cut.json", "-o", "plan.json")
ONE_F_ONE_B = (*PLAN, "--algorithm", "one_f_one_b")
ASSIGN = ("assign", "-o", "even", "problem.json")
PARTITION = ("partition", "-o", "new.json", "--problem", "problem.json", "--minutes", "0.001")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (ONE_F_ONE_B, ("--search", "local")),
        (ONE_F_ONE_B, ("--seed", "0")),
        (ONE_F_ONE_B, ("--workers", "1")),
        (ONE_F_ONE_B, ("--no-recompute",)),
        (PLAN, ("--search", "mcts")),
        (PLAN, ("--seed", "1")),
        (PLAN, ("--workers", "2")),
        ((*PLAN, "--max-tokens", "language=4"), ("--max-tokens", "language=8")),
        (ASSIGN, ("--tolerance", "0.1")),
        (ASSIGN, ("--between-replicas-only",)),
        ((*ASSIGN, "other.json", "--within"), ("--tolerance", "0.003")),
        (
            (*ASSIGN, "other.json", "--between-replicas-only"),
            ("--microbatch-tolerance", "0.02"),
        ),
        ((*ASSIGN, "--max-tokens", "language=999999"), ("--max-tokens", "language=98")),
        (PARTITION, ("--batches", "4")),
        ((*PARTITION, "--changes", "0"), ("--seed", "0")),
        (("simulate", "made.json"), ("--fit", "problem.json")),
        (("simulate", "made.json", "--baseline", "nested-encoder"), ("--fit", "problem.json")),
    ],
)
def test_an_option_without_effect_is_refused_at_any_value(files, command, options) -> None:
    refused = CliRunner().invoke(app, [*command, *options])
    assert refused.exit_code == 2, refused.output
    assert options[0] in refused.stderr and refused.stderr.count("\n") == 1
    assert CliRunner().invoke(app, list(command)).exit_code == 0


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("profile", "-o", "p.json", "--from", "run"), ("--steps", "12")),
        (("profile", "-o", "p.json", "--from", "run"), ("--ranks", "1")),
        (("profile", "-o", "p.json", "--from", "run"), ("--cpu",)),
        (("doctor", "--cluster", "cluster.yaml"), ("--tensor-parallel", "1")),
    ],
)
def test_an_option_beside_what_states_the_same_is_refused_at_any_value(command, options) -> None:
    refused = CliRunner().invoke(app, [*command, *options])
    assert refused.exit_code == 2 and f"{options[0]} beside {command[-2]}" in refused.stderr


@pytest.fixture
def files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem, partition = chain_case(2, 4)
    for name in ("problem", "other"):
        (tmp_path / f"{name}.json").write_text(problem.model_dump_json())
    (tmp_path / "cut.json").write_text(partition.model_dump_json())
    made = CliRunner().invoke(app, [*PLAN[:-1], "made.json"])
    assert made.exit_code == 0, made.output
