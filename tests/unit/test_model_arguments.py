"""What a file with a model makes of Megatron's arguments, without Megatron."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from validated_runs import ValidatedRuns

from megatron_dip.errors import ConfigError
from megatron_dip.families import arguments
from megatron_dip.families.arguments import ModelArguments


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ValidatedRuns:
    """Runs whose file, ``a.yaml``, states 10 layers and the type of the tokenizer."""
    stated = {"num_layers": 10, "tokenizer_type": "NullTokenizer"}
    config = SimpleNamespace(
        megatron_arguments=lambda: stated,
        model_shape=lambda: SimpleNamespace(modules=()),
        schedule=SimpleNamespace(assignment="none"),
    )
    monkeypatch.setattr(arguments, "load_config", lambda path: config)
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("{model: {}}")
    return ValidatedRuns(monkeypatch, ModelArguments())


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
