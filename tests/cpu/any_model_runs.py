"""Runs of scripts that know nothing of this package, under Megatron's schedule and under plans.

All start from one checkpoint of one rank, since initial weights depend on the layout.
"""

import json
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from training_runs import TrainingRun, train

__all__ = ["GPT_ARGUMENTS", "GPT_SCRIPT", "NUM_ITERATIONS", "ScriptRuns", "assert_equal"]

GPT_SCRIPT = Path(__file__).with_name("gpt_builder_script.py")
GPT_ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --mock-data
    --tokenizer-type NullTokenizer --vocab-size 64
    --micro-batch-size 2 --global-batch-size 8 --lr 0.001 --min-lr 0.001
"""
NUM_ITERATIONS = 3
# Relative; parts and orders of microbatches change the rounding of sums.
_TOLERANCE = 1e-6


class ScriptRuns:
    """Runs of one script.

    Args:
        folder: Takes logs, checkpoints and configurations.
        script: What is run.
        arguments: Of every run.
    """

    def __init__(self, folder: Path, script: Path, arguments: str) -> None:
        self._folder, self._script, self._arguments = folder, script, shlex.split(arguments)
        self._num_runs = 0

    def run(
        self,
        num_ranks: int,
        arguments: str,
        modules: dict[str, Any] | None = None,
        **schedule: Any,
    ) -> TrainingRun:
        """From the weights that all runs start from, unless ``arguments`` load others.

        Args:
            num_ranks: How many.
            arguments: Of this run.
            modules: ``schedule.modules`` of a configuration; Megatron's own schedule if None.
            schedule: What the configuration says of it besides.
        """
        if "--load" not in arguments:
            arguments += f" --load {self._weights} --finetune --no-load-optim --no-load-rng"
        if modules is not None:
            config = self._folder / f"{self._num_runs}.yaml"
            config.write_text(json.dumps({"schedule": {"modules": modules, **schedule}}))
            arguments += f" --dip-schedule --dip-config {config}"
        return self._train(num_ranks, f"{arguments} --train-iters {NUM_ITERATIONS}")

    @cached_property
    def _weights(self) -> Path:
        folder = self._folder / "weights"
        self._train(1, f"--train-iters 1 --save {folder} --save-interval 1 --no-save-optim")
        return folder

    def _train(self, num_ranks: int, arguments: str) -> TrainingRun:
        folder = self._folder / f"run{self._num_runs}"
        self._num_runs += 1
        options = (*self._arguments, "--exit-on-missing-checkpoint", *shlex.split(arguments))
        return train(folder, num_ranks, *options, script=self._script)


def assert_equal(ours: TrainingRun, expected: TrainingRun) -> None:
    """Losses and gradient norms, but for rounding; of as many last iterations as ours has."""
    last = slice(-len(ours.losses), None)
    assert ours.losses, ours.log[-4000:]
    for found, wanted in (
        (ours.losses, expected.losses[last]),
        (ours.grad_norms, expected.grad_norms[last]),
        (ours.validation_losses, expected.validation_losses),
    ):
        assert found == pytest.approx(wanted, rel=_TOLERANCE), f"{found} != {wanted}"
