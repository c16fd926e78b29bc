"""Megatron's arguments about data, batches and evaluation: combinations that are refused, and what
completes them.

Single flags are refused in ``flags``; everything else about them is Megatron's own, see
``loaders``.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.rules import LEAVE_OUT
from megatron_dip.integration.versions import evaluates_in_batches_of_its_own

__all__ = ["check_data_arguments", "complete_evaluation", "complete_full_validation"]

_DEFAULT_EVAL_INTERVAL = 1000


def check_data_arguments(args: argparse.Namespace, explicit: Mapping[str, Any]) -> None:
    """Refuse what the data of ``--dip-config`` cannot be combined with, before Megatron starts.

    Args:
        explicit: What the command line states, by destination.

    Raises:
        UnsupportedError: Names the flag and the remedy.
    """
    if not args.skip_train:
        _check_length(args)
    if args.phase_transition_iterations and not args.train_samples:
        raise UnsupportedError(
            "--phase-transition-iterations does not work without --train-samples: Megatron counts "
            "phases in samples; use it in place of --train-iters"
        )
    if args.full_validation:
        _check_full_validation(args, explicit)
    elif args.skip_train and not args.eval_iters:
        raise UnsupportedError(
            "--skip-train leaves nothing to do without an evaluation: add --eval-iters N or "
            "--full-validation"
        )
    if args.eval_interval is not None and args.eval_interval < 1:
        raise UnsupportedError(
            f"--eval-interval {args.eval_interval} does not work: give a number of iterations "
            f"above 0; without evaluation leave it out, or set --eval-iters 0"
        )


def _check_length(args: argparse.Namespace) -> None:
    if not args.train_iters and not args.train_samples:
        raise UnsupportedError(
            "there is nothing to train: give --train-iters N or --train-samples N, with N above "
            "0; to evaluate only, add --skip-train"
        )
    batch = args.global_batch_size or 1
    if args.train_samples and args.train_samples < batch:
        raise UnsupportedError(
            f"--train-samples {args.train_samples} does not work with --global-batch-size "
            f"{batch}: it is less than one batch"
        )


def _check_full_validation(args: argparse.Namespace, explicit: Mapping[str, Any]) -> None:
    if not evaluates_in_batches_of_its_own(args):
        raise UnsupportedError(
            "--full-validation does not work with this Megatron, which evaluates in batches of "
            "training and would take samples several times: use megatron-core 0.18 or later, or "
            f"{LEAVE_OUT}"
        )
    for flag, destination in (
        ("--eval-iters", "eval_iters"),
        ("--eval-micro-batch-size", "eval_micro_batch_size"),
        ("--eval-global-batch-size", "eval_global_batch_size"),
    ):
        # An evaluation of no iterations says no more than that none is counted.
        if explicit.get(destination):
            raise UnsupportedError(
                f"{flag} {explicit[destination]} does not work with --full-validation: "
                f"{LEAVE_OUT}; every sample is evaluated once, one per step and replica"
            )


def complete_evaluation(args: argparse.Namespace, explicit: Mapping[str, Any]) -> None:
    """No evaluation unless the command line asks for one.

    Megatron's own defaults (100 iterations, no interval) fail where it counts samples.
    """
    if "eval_interval" not in explicit:
        args.eval_interval = _DEFAULT_EVAL_INTERVAL
        if "eval_iters" not in explicit:
            args.eval_iters = 0
    if args.skip_train and args.train_iters is None and args.train_samples is None:
        # Megatron multiplies with it.
        args.train_iters = 0


def complete_full_validation(args: argparse.Namespace) -> None:
    """After Megatron's validation: batches of ``--full-validation`` as its sampler makes them.

    It hands out single samples; with the batch sizes of training every sample would be evaluated
    several times.
    """
    if args.full_validation:
        args.eval_micro_batch_size = 1
        args.eval_global_batch_size = args.data_parallel_size
