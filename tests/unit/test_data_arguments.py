"""Megatron's arguments about data and evaluation: those that are refused, each in one line."""

import argparse
from typing import Any

import pytest

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.evaluation import (
    check_data_arguments,
    complete_evaluation,
    complete_full_validation,
)


def arguments(**values: Any) -> argparse.Namespace:
    stated = {
        "train_iters": 10,
        "train_samples": None,
        "global_batch_size": 4,
        "phase_transition_iterations": None,
        "full_validation": False,
        "skip_train": False,
        "eval_iters": 2,
        "eval_interval": 5,
        "eval_micro_batch_size": None,
        "data_parallel_size": 2,
    }
    return argparse.Namespace(**(stated | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"phase_transition_iterations": "2,4"},
            ("--phase-transition-iterations", "--train-samples"),
        ),
        ({"skip_train": True, "eval_iters": 0}, ("--skip-train", "--eval-iters N")),
        ({"train_iters": 0}, ("--train-iters N", "--skip-train")),
        ({"train_iters": None}, ("--train-iters N", "--train-samples N")),
        (
            {"train_iters": None, "train_samples": 3},
            ("--train-samples 3", "--global-batch-size 4"),
        ),
        ({"eval_interval": 0}, ("--eval-interval 0", "above 0")),
        (
            {"full_validation": True, "eval_micro_batch_size": 4},
            ("--eval-micro-batch-size 4", "--full-validation"),
        ),
        (
            {"full_validation": True, "eval_global_batch_size": 8},
            ("--eval-global-batch-size 8", "--full-validation"),
        ),
        ({"full_validation": True, "eval_iters": 3}, ("--eval-iters 3", "--full-validation")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_data_cannot_be_combined_with_is_refused_by_its_flag(
    values: dict[str, Any], words: tuple[str, ...]
) -> None:
    check_data_arguments(arguments(), {})
    with pytest.raises(UnsupportedError) as refused:
        check_data_arguments(arguments(**values), values)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    "values",
    [
        {"phase_transition_iterations": "2,4", "train_samples": 40, "train_iters": None},
        {"skip_train": True},
        {"skip_train": True, "train_iters": 0},
        {"skip_train": True, "eval_iters": 0, "full_validation": True},
        {"full_validation": True, "eval_iters": 0},
    ],
)
def test_what_works_is_not_refused(values: dict[str, Any]) -> None:
    check_data_arguments(arguments(**values), values)


def test_nothing_is_evaluated_that_was_not_asked_for() -> None:
    args = arguments(eval_interval=None, eval_iters=100)
    complete_evaluation(args, {})
    assert (args.eval_iters, args.eval_interval) == (0, 1000)
    asked = arguments(eval_interval=None, eval_iters=3)
    complete_evaluation(asked, {"eval_iters": 3})
    assert (asked.eval_iters, asked.eval_interval) == (3, 1000)


def test_evaluation_alone_needs_no_number_of_iterations() -> None:
    args = arguments(skip_train=True, train_iters=None)
    complete_evaluation(args, {"eval_iters": 2, "eval_interval": 5})
    assert args.train_iters == 0


def test_full_validation_is_refused_where_evaluation_has_no_batches_of_its_own() -> None:
    args = arguments(full_validation=True, eval_iters=0)
    del args.eval_micro_batch_size
    with pytest.raises(UnsupportedError, match=r"--full-validation .* megatron-core 0\.18"):
        check_data_arguments(args, {})


def test_full_validation_evaluates_every_sample_once() -> None:
    args = arguments(full_validation=True, eval_micro_batch_size=4, eval_global_batch_size=16)
    complete_full_validation(args)
    assert (args.eval_micro_batch_size, args.eval_global_batch_size) == (1, 2)
    others = arguments(eval_micro_batch_size=4, eval_global_batch_size=16)
    complete_full_validation(others)
    assert (others.eval_micro_batch_size, others.eval_global_batch_size) == (4, 16)
