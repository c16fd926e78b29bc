"""Our arguments and the rules about Megatron's, without Megatron."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from validated_runs import ValidatedRuns

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.integration import arguments
from megatron_dip.integration.arguments import check_schedule_arguments
from megatron_dip.integration.cpu_mode.arguments import check_cpu_arguments


def schedule_args(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"dip_schedule": True, "dip_config": "a.yaml"} | values))


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"decoder_last_pipeline_num_layers": 2}, "--decoder-last-pipeline-num-layers 2"),
        ({"use_gloo_process_groups": False}, "--disable-gloo-process-groups does"),
        ({"ckpt_format": "torch", "save": "runs/saved"}, "--ckpt-format torch"),
    ],
)
def test_what_contradicts_the_schedule_is_refused_by_its_flag(
    values: dict[str, Any], flag: str
) -> None:
    check_schedule_arguments(schedule_args())
    with pytest.raises(UnsupportedError) as refused:
        check_schedule_arguments(schedule_args(**values))
    assert flag in str(refused.value)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"fp8": "hybrid"}, "--fp8-format hybrid"),
        ({"distributed_backend": "nccl"}, "--distributed-backend nccl"),
        ({"tp_comm_overlap": True}, "--tp-comm-overlap does"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"use_distributed_optimizer": True, "optimizer": "sgd"}, "--optimizer sgd"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "--recompute-modules layernorm",
        ),
    ],
)
def test_what_needs_cuda_is_refused_by_its_flag(values: dict[str, Any], flag: str) -> None:
    check_cpu_arguments(argparse.Namespace(transformer_impl="local", fp8=None))
    with pytest.raises(UnsupportedError) as refused:
        check_cpu_arguments(argparse.Namespace(**values))
    assert flag in str(refused.value)


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function from a command line to the arguments that Megatron's own validation sees.

    The file ``a.yaml`` of the folder states a schedule for 4 ranks.
    """
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("schedule: {num_ranks: 4}")
    return ValidatedRuns(monkeypatch)


def test_layers_need_not_divide_by_pipeline_ranks_under_the_schedule_alone(validated: Any) -> None:
    flags = ("--dip-config", "a.yaml", "--num-layers", "10")
    seen, after = validated(*flags, "--dip-schedule")
    assert seen["decoder_first_pipeline_num_layers"] is not None
    assert after.decoder_first_pipeline_num_layers is None
    # Megatron's own schedule needs it, and Megatron says so.
    seen, _ = validated(*flags)
    assert seen["decoder_first_pipeline_num_layers"] is None


def test_megatrons_own_placement_of_layers_is_left_to_its_own_schedule(validated: Any) -> None:
    flags = ("--dip-config", "a.yaml", "--decoder-first-pipeline-num-layers", "3")
    seen, after = validated(*flags)
    assert seen["decoder_first_pipeline_num_layers"] == 3
    assert after.decoder_first_pipeline_num_layers == 3
    with pytest.raises(UnsupportedError, match="--decoder-first-pipeline-num-layers 3"):
        validated(*flags, "--dip-schedule")


def test_a_flag_of_the_main_branch_alone_is_refused() -> None:
    args = argparse.Namespace(save=None, enable_mhc_connections=True)
    with pytest.raises(UnsupportedError, match="--enable-mhc-connections does not work with"):
        check_schedule_arguments(args)


def test_a_schedule_for_another_number_of_ranks_is_refused(validated: Any) -> None:
    flags = ("--dip-config", "a.yaml", "--pipeline-model-parallel-size", "2")
    validated(*flags)
    with pytest.raises(ConfigError, match=r"num_ranks is 4 .*--pipeline-model-parallel-size 2"):
        validated(*flags, "--dip-schedule")


def test_without_our_arguments_nothing_changes(validated: Any) -> None:
    seen, _ = validated("--num-layers", "12")
    assert seen["num_layers"] == 12
    assert seen["tokenizer_type"] == "SentencePiece"
    assert seen["decoder_first_pipeline_num_layers"] is None


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_a_time_limit_that_is_none_is_refused(validated: Any, text: str) -> None:
    assert validated("--dip-timeout-seconds", "1.5")[1].dip_timeout_seconds == 1.5
    with pytest.raises(SystemExit):
        validated("--dip-timeout-seconds", text)


def test_a_distributed_optimizer_is_saved_so_that_other_partitions_can_load_it() -> None:
    saved = {"use_distributed_optimizer": True, "save": "folder"}
    args = argparse.Namespace(dip_config="a.yaml", dist_ckpt_optim_fully_reshardable=False, **saved)
    with pytest.raises(UnsupportedError, match="add --dist-ckpt-optim-fully-reshardable"):
        arguments.check_schedule_arguments(args)
    args.dist_ckpt_optim_fully_reshardable = True
    arguments.check_schedule_arguments(args)


def test_a_plan_needs_no_file(validated: Any) -> None:
    _, args = validated("--dip-schedule")
    assert args.dip_schedule and args.dip_config is None


def test_what_nobody_reads_in_the_file_is_refused_with_who_would(validated: Any) -> None:
    Path("b.yaml").write_text("schedule: {}\nmodel: {}\ndata: {}")
    with pytest.raises(ConfigError, match=r"b\.yaml: nobody reads data, model .*examples/"):
        validated("--dip-config", "b.yaml")
