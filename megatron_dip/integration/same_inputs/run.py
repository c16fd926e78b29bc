"""The comparison of a run's inputs, at the moments when Megatron can be stopped for it."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_dip.integration.same_inputs.collect import (
    argument_inputs,
    code_inputs,
    environment_inputs,
    file_input,
)
from megatron_dip.integration.same_inputs.compare import Input, compare_inputs

__all__ = ["check_same_index", "check_same_inputs"]


def check_same_inputs(
    args: argparse.Namespace,
    destinations: Sequence[str],
    config_inputs: Iterable[tuple[str, Input]],
) -> None:
    """Compare what all ranks were given; the same call on all, once torch.distributed is there.

    Args:
        args: As the command line was read.
        destinations: Of the command line's flags.
        config_inputs: What the file of ``--dip-config`` gives.

    Raises:
        ConfigError: Names what differs, and where.
        ChannelError: Another rank did not get as far within ``--dip-timeout-seconds``.
    """
    inputs = dict(_inputs(args, destinations)) | dict(config_inputs)
    _compare("inputs", inputs, args.dip_timeout_seconds)


def check_same_index(path: Path, timeout_seconds: float) -> None:
    """As :func:`check_same_inputs`, for the index of the data that this rank reads."""
    _compare(f"index/{path.name}", {"data index": file_input(path)}, timeout_seconds)


def _inputs(args: argparse.Namespace, destinations: Sequence[str]) -> Iterator[tuple[str, Input]]:
    yield from code_inputs()
    yield from argument_inputs(args, destinations)
    yield from environment_inputs(os.environ)


def _compare(name: str, inputs: dict[str, Input], timeout_seconds: float) -> None:
    every = dist.PrefixStore(f"megatron_dip/{name}", _get_default_store())
    # A process may train twice; keys of the first time must not be read in the second.
    call = every.add(f"calls of {dist.get_rank()}", 1)
    store = dist.PrefixStore(str(call), every)
    compare_inputs(
        store,
        inputs,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        timeout_seconds=timeout_seconds,
    )
