"""Under which hardware queues the ranks of a run put their kernels."""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch.distributed as dist

from megatron_dip.errors import ConfigError
from megatron_dip.partition import Partition
from megatron_dip.plan import Plan, QueueModel, one_queue_model

__all__ = ["choose_queues"]

# CUDA's own default, and as many as the streams that torch hands out of one priority.
_DEFAULT_CONNECTIONS = 8
_ENOUGH_CONNECTIONS = 32


def choose_queues(
    setting: Literal["auto", "one", "many"],
    partition: Partition,
    upstream: Mapping[str, Sequence[str]],
    fixed: Plan | None = None,
) -> QueueModel | None:
    """What plans of this run are made for; None where every stream has a queue of its own.

    Streams share queues unless there is one for each.  A plan for one queue also runs where several
    are shared, whichever streams meet in them.  Ranks have been found to have the same environment
    before this is asked.

    Args:
        setting: ``schedule.hardware_queues``.
        partition: The cut.
        upstream: For each module the modules that it reads.
        fixed: The plan for all batches, where there is one.

    Raises:
        ConfigError: It is made for many queues, and ranks have one.
    """
    has_one = setting == "one" or (setting == "auto" and _shares_queues())
    if fixed is None:
        return one_queue_model(partition, upstream) if has_one else None
    if has_one and fixed.queues is None:
        raise ConfigError(
            "schedule.plan is made for many hardware queues, and could wait for ever where streams "
            f"share them, as with CUDA_DEVICE_MAX_CONNECTIONS={_connections()} (plan with "
            f"`megatron-dip plan --hardware-queues one`, or run with {_ENOUGH_CONNECTIONS} "
            "connections)"
        )
    return fixed.queues


def _shares_queues() -> bool:
    return dist.get_backend() != "gloo" and _connections() < _ENOUGH_CONNECTIONS


def _connections() -> int:
    stated = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    return int(stated) if stated.isdecimal() else _DEFAULT_CONNECTIONS
