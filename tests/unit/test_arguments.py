"""Our arguments and the rules about Megatron's, without Megatron."""

import argparse
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dip.errors import ConfigError, UnsupportedError
from megatron_dip.families.flags import ParserFlags
from megatron_dip.integration import arguments
from megatron_dip.integration.arguments import ArgumentValidation, check_schedule_arguments
from megatron_dip.integration.cpu_mode.arguments import check_cpu_arguments


def schedule_args(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"dip_schedule": True, "dip_config": "a.yaml"} | values))


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"decoder_last_pipeline_num_layers": 2}, "--decoder-last-pipeline-num-layers 2"),
        ({"overlap_param_gather": True}, "--overlap-param-gather does"),
        ({"use_gloo_process_groups": False}, "--disable-gloo-process-groups does"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch"),
        ({"dip_config": None}, "--dip-schedule needs a model"),
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
def validated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from a command line to the arguments that Megatron's own validation sees.

    The file of ``--dip-config`` states 10 layers, the type of the tokenizer and a schedule for 4
    ranks.
    """
    stated = {"num_layers": 10, "tokenizer_type": "NullTokenizer"}
    config = SimpleNamespace(
        schedule=SimpleNamespace(num_ranks=4),
        megatron_arguments=lambda: stated,
        model_shape=lambda: SimpleNamespace(modules=()),
    )
    monkeypatch.setattr(arguments, "load_config", lambda path: config)
    seen: dict[str, Any] = {}
    validation = ArgumentValidation(lambda args, defaults: seen.update(vars(args)))

    def install(parser: argparse.ArgumentParser) -> None:
        if validation.flags is None or validation.flags.parser is not parser:
            validation.flags = ParserFlags(parser, validation.note_parsed)

    monkeypatch.setattr(arguments, "_install_validation", install)

    def run(*command_line: str) -> tuple[dict[str, Any], argparse.Namespace]:
        monkeypatch.setattr(sys, "argv", ["script.py", *command_line])
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--num-layers", type=int, default=None)
        parser.add_argument("--tokenizer-type", default="SentencePiece")
        parser.add_argument("--pipeline-model-parallel-size", type=int, default=4)
        parser.add_argument("--eval-iters", type=int, default=100)
        parser.add_argument("--eval-interval", type=int, default=None)
        parser.add_argument("--skip-train", action="store_true")
        parser.add_argument("--train-iters", type=int, default=5)
        parser.add_argument("--train-samples", type=int, default=None)
        parser.add_argument("--global-batch-size", type=int, default=None)
        parser.add_argument("--full-validation", action="store_true")
        parser.add_argument("--phase-transition-iterations", default=None)
        parser.add_argument("--decoder-first-pipeline-num-layers", type=int, default=None)
        arguments.add_arguments(arguments.add_arguments(parser))
        seen.clear()
        args = parser.parse_args()
        validation(args, {})
        return dict(seen), args

    return run


def test_the_configuration_sets_what_the_command_line_leaves_open(validated: Any) -> None:
    seen, _ = validated("--dip-config", "a.yaml")
    assert seen["num_layers"] == 10
    assert seen["tokenizer_type"] == "NullTokenizer"


def test_a_flag_that_agrees_with_the_configuration_is_accepted(validated: Any) -> None:
    seen, _ = validated("--dip-config", "a.yaml", "--num-layers", "10")
    assert seen["num_layers"] == 10


def test_a_flag_that_contradicts_the_configuration_is_refused_with_both_values(
    validated: Any,
) -> None:
    with pytest.raises(ConfigError, match=r"--num-layers 12.*a\.yaml.*10"):
        validated("--dip-config", "a.yaml", "--num-layers", "12")


def test_a_flag_that_states_the_default_still_contradicts_the_configuration(
    validated: Any,
) -> None:
    with pytest.raises(ConfigError, match="SentencePiece"):
        validated("--dip-config", "a.yaml", "--tokenizer-type", "SentencePiece")


def test_layers_need_not_divide_by_pipeline_ranks_under_the_schedule_alone(validated: Any) -> None:
    seen, after = validated("--dip-config", "a.yaml", "--dip-schedule")
    assert seen["decoder_first_pipeline_num_layers"] is not None
    assert after.decoder_first_pipeline_num_layers is None
    # Megatron's own schedule needs it, and Megatron says so.
    seen, _ = validated("--dip-config", "a.yaml")
    assert seen["decoder_first_pipeline_num_layers"] is None


def test_megatrons_own_placement_of_layers_is_left_to_its_own_schedule(validated: Any) -> None:
    flags = ("--dip-config", "a.yaml", "--decoder-first-pipeline-num-layers", "3")
    seen, after = validated(*flags)
    assert seen["decoder_first_pipeline_num_layers"] == 3
    assert after.decoder_first_pipeline_num_layers == 3
    with pytest.raises(UnsupportedError, match="--decoder-first-pipeline-num-layers 3"):
        validated(*flags, "--dip-schedule")


def test_a_schedule_for_another_number_of_ranks_is_refused(validated: Any) -> None:
    flags = ("--dip-config", "a.yaml", "--pipeline-model-parallel-size", "2")
    validated(*flags)
    with pytest.raises(ConfigError, match=r"num_ranks is 4 .*--pipeline-model-parallel-size 2"):
        validated(*flags, "--dip-schedule")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (0, 1000)),
        ("--eval-iters 3", (3, 1000)),
        ("--eval-interval 5", (100, 5)),
        ("--eval-iters 3 --eval-interval 5", (3, 5)),
    ],
)
def test_a_run_is_evaluated_only_if_its_command_line_says_so(
    validated: Any, flags: str, expected: tuple[int, int]
) -> None:
    """Megatron's own defaults, 100 iterations and no interval, fail where it counts samples."""
    seen, _ = validated("--dip-config", "a.yaml", *flags.split())
    assert (seen["eval_iters"], seen["eval_interval"]) == expected
    unchanged, _ = validated(*flags.split())
    assert unchanged["eval_interval"] in (None, 5)


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
