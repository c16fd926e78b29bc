"""Command lines through our validation of arguments, without Megatron."""

import argparse
import sys
from typing import Any

import pytest

from megatron_dip.integration import arguments
from megatron_dip.integration.arguments import ArgumentValidation, ScriptPart

__all__ = ["ValidatedRuns"]


class ValidatedRuns:
    """From a command line to what Megatron's own validation sees, and to the arguments after it.

    ``script`` is the part of the run's script, if it has one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: ScriptPart | None = None) -> None:
        self._monkeypatch = monkeypatch
        self._script = script
        self._seen: dict[str, Any] = {}
        self._validation = ArgumentValidation(lambda args, defaults: self._seen.update(vars(args)))
        monkeypatch.setattr(arguments, "_install_validation", self._validation.watch)

    def __call__(self, *command_line: str) -> tuple[dict[str, Any], argparse.Namespace]:
        self._monkeypatch.setattr(sys, "argv", ["script.py", *command_line])
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
        parser.add_argument("--micro-batch-size", type=int, default=None)
        parser.add_argument("--eval-micro-batch-size", type=int, default=None)
        parser.add_argument("--full-validation", action="store_true")
        parser.add_argument("--phase-transition-iterations", default=None)
        parser.add_argument("--decoder-first-pipeline-num-layers", type=int, default=None)
        parser.add_argument("--skip-bad-samples", action="store_true")
        arguments.add_arguments(arguments.add_arguments(parser))
        if self._script is not None:
            self._validation.read_by(self._script)
        self._seen = {}
        args = parser.parse_args()
        self._validation(args, {})
        return self._seen, args
