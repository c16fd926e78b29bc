"""Every flag of Megatron's parser that a run states is honoured, or refused with the reason."""

import argparse
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import arguments as megatron_arguments
from megatron.training.arguments import core_transformer_config_from_args

from megatron_dip.config import load_dip_config
from megatron_dip.errors import ConfigError, DipError, UnsupportedError
from megatron_dip.families import arguments as model_arguments
from megatron_dip.families.configs import load_config
from megatron_dip.families.flags import GROUPS, Verdict, check_flags, group_of
from megatron_dip.families.flags.page import put_between, tables
from megatron_dip.families.packed import configs
from megatron_dip.families.packed.configs import make_language_config, make_vision_config
from megatron_dip.integration import arguments
from megatron_dip.integration.arguments import ArgumentValidation, check_schedule_arguments
from megatron_dip.integration.cpu_mode.arguments import (
    CPU_DEFAULTS,
    CPU_RULES,
    check_cpu_arguments,
)
from megatron_dip.integration.flag_groups import CONDITIONS, PARSER_GROUPS, Answer
from megatron_dip.integration.flag_rules import CHECKPOINT_RULES, SCHEDULE_RULES
from megatron_dip.integration.parser_flags import ParserFlags
from megatron_dip.integration.rules import Rule

CONFIGS = Path(__file__).parents[2] / "configs"
VLM = str(CONFIGS / "vlm_tiny.yaml")
# Where an optional package adds them.
OPTIONAL = {"kitchen_config_file", "kitchen_recipe_number"}
SIZES = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}


class Reader:
    """Megatron's parser under our validation, as the launcher sets it up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, validate_args: Any) -> None:
        self.validation = ArgumentValidation(validate_args)
        # A walk of the parser reads the same two files hundreds of times.
        monkeypatch.setattr(model_arguments, "load_config", cache(load_config))
        monkeypatch.setattr(arguments, "load_dip_config", cache(load_dip_config))
        monkeypatch.setattr(megatron_arguments, "validate_args", self.validation)
        self.parser = argparse.ArgumentParser(allow_abbrev=False)
        megatron_arguments.add_megatron_arguments(self.parser)
        self.actions = tuple(self.parser._actions)
        self.parser.set_defaults(**CPU_DEFAULTS)
        arguments.add_arguments(self.parser)
        model_arguments.add_arguments(self.parser)

    def read(self, *words: str, config: str = VLM) -> argparse.Namespace:
        length = [] if "--train-iters" in words else ["--train-iters", "2"]
        args = self.parser.parse_args([*words, *length, "--dip-config", config])
        args.rank, args.world_size, args.data_parallel_size = 0, 1, 1
        self.validation(args, {})
        return args


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch, lambda args, defaults: None)


VALUES = {
    "exit_signal": "SIGUSR1",
    "attention_backend": "flash",
    "loss_scale": "2.0",
    "optimizer": "sgd",
    "rerun_mode": "disabled",
    "transformer_impl": "local",
    "cuda_graph_modules": "attn",
    "cuda_graph_scope_deprecated": "attn",
}


def words_for(action: argparse.Action) -> list[str]:
    """A statement of a flag with another value than its default, where it takes one."""
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    if action.dest in VALUES:
        values = [VALUES[action.dest]]
    elif action.choices:
        different = [choice for choice in action.choices if choice != action.default]
        values = [str(getattr(different[-1], "name", different[-1]))]
    else:
        values = ["3"]
    return [option, *values * (action.nargs if isinstance(action.nargs, int) else 1)]


def statements(actions: Sequence[argparse.Action]) -> Iterator[tuple[str, list[str]]]:
    """Every flag once by every name that it has, with its destination."""
    for action in actions:
        if action.dest == "help":
            continue
        words = words_for(action)
        for option in action.option_strings:
            yield action.dest, [option, *words[1:]]


def test_every_flag_of_megatron_has_one_verdict(reader: Reader):
    destinations = {action.dest for action in reader.actions} - {"help"}
    assert {name for name in destinations if group_of(name) is None} == set()
    named = [name for group in GROUPS for name in group.destinations]
    assert sorted(name for name in set(named) if named.count(name) > 1) == []
    assert set(named) - destinations == OPTIONAL


def test_every_flag_that_is_stated_is_honoured_or_refused_in_one_line(reader: Reader):
    """The whole parser, by every name of every flag; the verdict is what the table says."""
    wrong = []
    for destination, words in statements(reader.actions):
        outcome = outcome_of(reader, words)
        group = group_of(destination)
        assert group is not None
        wrong += [] if outcome in EXPECTED[group.verdict] else [(words, outcome)]
    assert wrong == []


EXPECTED = {
    Verdict.MEGATRON: {"honoured"},
    Verdict.MODULES: {"honoured", "depends"},
    Verdict.DATA: {"honoured", "depends"},
    Verdict.EXPERTS: {"no experts"},
    Verdict.FILE: {"file", "honoured"},
    Verdict.REFUSED: {"refused"},
}


def outcome_of(reader: Reader, words: list[str]) -> str:
    try:
        reader.read(*words)
    except DipError as error:
        text = str(error)
        assert "\n" not in text and words[0].split("-")[-1] in text.replace("_", "-")
        return next((name for name, sign in SIGNS.items() if sign in text), "depends")
    return "honoured"


SIGNS = {
    "refused": "does not work with the models of --dip-config: ",
    "no experts": "says something of experts",
    "file": VLM,
}


def test_a_flag_is_refused_although_it_states_its_default(reader: Reader):
    reader.read("--context-parallel-size", "1", "--mtp-num-layers", "0")
    with pytest.raises(UnsupportedError, match=r"--patch-dim 16 .*model\.vision\.patch_size"):
        reader.read("--patch-dim", "16")
    with pytest.raises(UnsupportedError, match="--wgrad-deferral-limit 0"):
        reader.read("--wgrad-deferral-limit", "0")


def test_samples_are_divided_by_families_that_can_under_plans_alone(reader: Reader):
    flags = ("--context-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    assert reader.read(*flags, "--dip-schedule").context_parallel_size == 2
    with pytest.raises(UnsupportedError, match=r"parallel-size 2 .*needs --dip-schedule"):
        reader.read(*flags)
    omni = str(CONFIGS / "omni_tiny.yaml")
    assert reader.read(*flags, "--dip-schedule", config=omni).context_parallel_size == 2
    for name in ("t2v_tiny.yaml", "lavin_tiny.yaml"):
        with pytest.raises(UnsupportedError, match=r"size 2 .*this family of models.*not divide"):
            reader.read(*flags, "--dip-schedule", config=str(CONFIGS / name))


def test_a_flag_of_the_model_must_agree_with_the_file(reader: Reader):
    stated = load_config(VLM).megatron_arguments()
    reader.read("--hidden-size", str(stated["hidden_size"]))
    with pytest.raises(ConfigError, match="--hidden-size 3 contradicts"):
        reader.read("--hidden-size", "3")
    with pytest.raises(ConfigError, match=r"--rotary-base 3 .*t2v_tiny\.yaml: state it there"):
        reader.read("--rotary-base", "3", config=str(CONFIGS / "t2v_tiny.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer muon", "--optimizer muon .*use adam, sgd or lion"),
        ("--attention-backend flash", "--attention-backend flash .*--transformer-impl local"),
        ("--rerun-mode report_stats", "--rerun-mode report_stats .*validate_results"),
        ("--no-bias-gelu-fusion", "state --no-bias-gelu-fusion and --no-bias-swiglu-fusion"),
    ],
)
def test_a_value_or_a_pair_that_does_not_work_is_refused(reader: Reader, flags: str, message: str):
    with pytest.raises(UnsupportedError, match=message):
        reader.read(*flags.split())
    reader.read("--no-bias-gelu-fusion", "--no-bias-swiglu-fusion", "--optimizer", "sgd")


def test_a_flag_that_needs_a_package_names_it(reader: Reader, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_dip.families.flags.check.find_spec", lambda name: None)
    reader.read("--async-save")
    with pytest.raises(UnsupportedError, match="worker needs nvidia-resiliency-ext"):
        reader.read("--async-save", "--use-persistent-ckpt-worker")


@pytest.mark.parametrize("flag", ["--hidden-dropout 0.2", "--cross-entropy-loss-fusion"])
def test_what_no_module_of_the_model_has_is_refused(reader: Reader, flag: str):
    reader.read(*flag.split())
    with pytest.raises(UnsupportedError, match=flag):
        reader.read(*flag.split(), config=str(CONFIGS / "t2v_tiny.yaml"))


def test_a_default_that_a_script_sets_is_no_less_stated(reader: Reader):
    reader.parser.set_defaults(window_size="3,0")
    with pytest.raises(UnsupportedError, match=r"--window-size \(3, 0\)"):
        reader.read()
    reader.parser.set_defaults(window_size=None)
    args = reader.parser.parse_args(["--dip-config", VLM])
    with pytest.raises(UnsupportedError, match="args_defaults tokenizer_model='a' "):
        reader.validation(args, {"tokenizer_model": "a"})


def test_a_flag_that_a_script_adds_is_its_own_and_ours_are_ours(reader: Reader):
    reader.read("--dip-trace-interval", "5", "--dip-planner-cores", "1", "--skip-bad-samples")
    reader.parser.add_argument("--my-own-flag", type=int, default=1)
    assert reader.read("--my-own-flag", "5").my_own_flag == 5


def test_a_flag_of_another_megatron_is_refused():
    parser = argparse.ArgumentParser()
    parser.add_argument("--new-attention", action="store_true")
    parser.add_argument("--dip-config")
    seen: list[Any] = []
    flags = ParserFlags(parser, lambda args, words: seen.append((args, words)))
    args = parser.parse_args(["--new-attention"])
    stated = flags.stated(args, flags.explicit(["--new-attention"]), ["--new-attention"])
    with pytest.raises(UnsupportedError, match="--new-attention is a flag of Megatron that this"):
        check_flags(args, stated, VLM, load_config(VLM))


def test_a_run_without_our_models_may_state_everything(reader: Reader):
    args = reader.parser.parse_args(["--window-size", "3,0", "--data-path", "a", "--qk-layernorm"])
    assert reader.validation(args, {}) is None
    with pytest.raises(UnsupportedError, match="--skip-bad-samples is for the data of"):
        reader.parser.parse_args(["--skip-bad-samples"])


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--qk-layernrm"], ["unrecognized arguments: --qk-layernrm", "--qk-layernorm"]),
        (["--train-iters", "x"], ["argument --train-iters: invalid int value: 'x'"]),
        (["--attention-backend", "x"], ["argument --attention-backend: invalid value: 'x'"]),
        (["--dip-schedul=1"], ["--dip-schedul=1", "near to --dip-schedul: --dip-schedule"]),
        (["--a" * 900], ["--a--a", "..."]),
    ],
)
def test_a_command_line_that_cannot_be_read_is_answered_in_a_few_lines(
    reader: Reader, capsys: pytest.CaptureFixture[str], words: list[str], lines: list[str]
):
    with pytest.raises(SystemExit) as ended:
        reader.parser.parse_args(words)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) <= 4 and len(printed) < 600
    assert all(line in printed for line in lines)


def test_the_page_of_flags_says_what_the_code_does():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    page = (CONFIGS.parent / "docs" / "flags.md").read_text()
    written = put_between(page, tables(megatron_arguments.add_megatron_arguments(parser)))
    assert page == written, "python -m megatron_dip.families.flags.page docs/flags.md"


# The fields of Megatron's configuration that flags of other names set.
FIELDS = {
    "fp8_param_gather": "fp8_param",
    "bias_swiglu_fusion": "bias_activation_fusion",
    "bias_gelu_fusion": "bias_activation_fusion",
    "no_persist_layer_norm": "persist_layer_norm",
    "recompute_activations": "recompute_granularity",
}


def test_what_modules_honour_is_in_their_configurations():
    for group in GROUPS:
        if group.verdict in (Verdict.MODULES, Verdict.EXPERTS):
            for destination in group.destinations:
                field = FIELDS.get(destination, destination)
                taken = {*configs._OF_THE_RUN, *configs._EXPERTS_OF_THE_RUN, "apply_rope_fusion"}
                assert field in taken, destination
                assert field in TransformerConfig.__dataclass_fields__, destination


REACHED = {
    "--bf16 --fp32-residual-connection --attention-softmax-in-fp32 --hidden-dropout 0.25 "
    "--attention-dropout 0.125 --norm-epsilon 0.001 --init-method-std 0.5 "
    "--embedding-init-method-std 0.25 --calculate-per-token-loss --recompute-activations "
    "--use-cpu-initialization --no-barrier-with-level-1-timing --cross-entropy-loss-fusion": {
        "bf16": True,
        "fp32_residual_connection": True,
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.25,
        "attention_dropout": 0.125,
        "layernorm_epsilon": 0.001,
        "init_method_std": 0.5,
        "embedding_init_method_std": 0.25,
        "calculate_per_token_loss": True,
        "recompute_granularity": "selective",
        "use_cpu_initialization": True,
        "barrier_with_L1_time": False,
        "cross_entropy_loss_fusion": True,
    },
    "--fp16 --apply-query-key-layer-scaling --recompute-granularity full "
    "--recompute-method block --recompute-num-layers 1": {
        "fp16": True,
        "apply_query_key_layer_scaling": True,
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}


def test_a_flag_reaches_the_configuration_of_every_module(monkeypatch: pytest.MonkeyPatch):
    without = module_configs(monkeypatch)
    for flags, expected in REACHED.items():
        for config, plain in zip(module_configs(monkeypatch, *flags.split()), without, strict=True):
            assert {name: getattr(config, name) for name in expected} == expected
            assert [name for name in expected if getattr(plain, name) == expected[name]] == []


def module_configs(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[TransformerConfig]:
    """Of a language and of a vision module, by Megatron's own validation of a command line."""
    monkeypatch.setattr(megatron_arguments, "_print_args", lambda title, args: None)
    reader = Reader(monkeypatch, VALIDATE)
    args = reader.read("--micro-batch-size", "1", *words)
    base = core_transformer_config_from_args(args)
    return [make_language_config(base, **SIZES), make_vision_config(base, **SIZES)]


VALIDATE = megatron_arguments.validate_args


def test_what_megatron_refuses_is_one_line_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    reader = Reader(monkeypatch, VALIDATE)
    with pytest.raises(ConfigError, match=r"Megatron refuses.*assert args.micro_batch_size is not"):
        reader.read("--train-iters", "1")
    with pytest.raises(ConfigError, match=r"assert not args\.bf16"):
        reader.read("--train-iters", "1", "--micro-batch-size", "1", "--fp16", "--bf16")


def test_every_flag_that_plans_refuse_is_one_of_megatrons_and_off_by_default(
    reader: Reader,
) -> None:
    """Each is given on a command line, with whatever script."""
    own = ["--save", "runs/saved", "--dip-schedule", "--dist-ckpt-optim-fully-reshardable"]
    assert reader.validation(reader.parser.parse_args(own), {}) is None
    for rule in (*SCHEDULE_RULES, *CHECKPOINT_RULES):
        args = reader.parser.parse_args([*own, *refused_words(reader, rule)])
        message = f"{rule.flag}.* does not work with --dip-schedule: {re.escape(rule.remedy)}"
        with pytest.raises(UnsupportedError, match=message):
            reader.validation(args, {})


def test_every_flag_that_needs_a_gpu_is_refused_without_one(reader: Reader) -> None:
    check_cpu_arguments(reader.parser.parse_args([]))
    for rule in CPU_RULES:
        args = reader.parser.parse_args(refused_words(reader, rule))
        message = rf"{rule.flag}.* does not work on the CPU \(--cpu\): {re.escape(rule.remedy)}"
        with pytest.raises(UnsupportedError, match=message):
            check_cpu_arguments(args)


def refused_words(reader: Reader, rule: Rule) -> list[str]:
    """A command line that breaks ``rule``, which must be about a flag of Megatron's that is off."""
    (action,) = [one for one in reader.actions if rule.flag in one.option_strings]
    assert action.dest == rule.destination
    default = CPU_DEFAULTS.get(action.dest, action.default)
    assert default in rule.allowed
    words = words_for(action)
    if action.choices and words[-1] in rule.allowed:
        words[-1] = next(choice for choice in action.choices if choice not in rule.allowed)
    return [rule.flag, *words[1:]]


def test_every_group_of_megatrons_parser_has_a_row_in_the_page(reader: Reader) -> None:
    groups = {group.title: group._group_actions for group in reader.parser._action_groups}
    of_megatron = {
        title for title, actions in groups.items() if any(one in reader.actions for one in actions)
    }
    assert of_megatron - {"options", "kitchen"} == set(PARSER_GROUPS)
    flags = {option for action in reader.actions for option in action.option_strings}
    assert set(CONDITIONS) <= flags
    refused = {rule.flag for rule in SCHEDULE_RULES}
    for title, (answer, _) in PARSER_GROUPS.items():
        options = {option for action in groups[title] for option in action.option_strings}
        assert answer is not Answer.NO or options & refused, title


def test_a_run_without_checkpoints_may_state_any_format_of_them() -> None:
    args = argparse.Namespace(ckpt_format="torch", save=None, load=None)
    check_schedule_arguments(args)
    with pytest.raises(UnsupportedError, match="--ckpt-format torch does not work"):
        check_schedule_arguments(argparse.Namespace(**vars(args) | {"load": "runs/saved"}))
