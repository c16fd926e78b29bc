"""Groups of processes that plans need beside Megatron's own; making one is a call of the world."""

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import mpu

from megatron_dip.partition import Partition
from megatron_dip.runtime import PlanAgreement, RankPlace, connected_groups

__all__ = [
    "create_agreement",
    "create_group",
    "gather_distinct",
    "gather_places",
    "replica_ranks",
]


def gather_distinct(ranks: Sequence[int]) -> list[list[int]]:
    """The rank lists of all processes of the world, each once, in one order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(ranks))
    return [list(ranks) for ranks in sorted({tuple(ranks) for ranks in gathered})]


def gather_places(planner_cores: Sequence[int], *, is_owner: bool) -> list[RankPlace]:
    """Where all ranks of the world run, in their order; a collective call.

    Args:
        planner_cores: Those that are named for planners; none where planners run beside ranks.
        is_owner: Whether this rank has planners.
    """
    cores = tuple(planner_cores) or tuple(sorted(os.sched_getaffinity(0)))
    place = RankPlace(
        # A hash of numbers is the same in all processes; the cores themselves may be hundreds.
        name=f"{socket.gethostname()}/{hash(cores)}",
        num_cores=len(cores),
        is_for_planners=bool(planner_cores),
        is_owner=is_owner,
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tuple(place))
    return [RankPlace(*one) for one in gathered]


def replica_ranks() -> list[int]:
    """The ranks that work on one batch: this one's tensor, context and pipeline peers.

    Context peers hold other rows of the same samples, and meet in every attention: they run the
    same plan, as tensor peers do.  A collective call of the whole world.
    """
    own = [mpu.get_model_parallel_group(), mpu.get_context_parallel_group()]
    parts = [part for group in own for part in gather_distinct(dist.get_process_group_ranks(group))]
    return next(ranks for ranks in connected_groups(parts) if dist.get_rank() in ranks)


def create_agreement(
    partition: Partition, replica: Sequence[int], timeout_seconds: float
) -> PlanAgreement:
    """Of all ranks that run one plan: those of a replica, and of all that it shares experts with.

    Args:
        replica: As :func:`replica_ranks`.
    """
    replicas = gather_distinct(replica)
    experts = dist.get_process_group_ranks(mpu.get_expert_tensor_and_model_parallel_group())
    groups = connected_groups([*replicas, *gather_distinct(experts)])
    own = next(group for group in groups if dist.get_rank() in group)
    sharing = [members for members in replicas if members[0] in own]
    return PlanAgreement(
        partition,
        create_group(groups, timeout_seconds, "plans"),
        leaders=[own.index(members[0]) for members in sharing],
        replica=sharing.index(list(replica)),
    )


def create_group(
    groups: Sequence[Sequence[int]], timeout_seconds: float, use: str
) -> dist.ProcessGroup:
    """The CPU group of this rank among ``groups``, which all ranks of the world make."""
    result: dist.ProcessGroup | None = None
    for members in groups:
        group = dist.new_group(
            list(members),
            timeout=timedelta(seconds=timeout_seconds),
            backend="gloo",
            group_desc=f"dip: {use}",
        )
        if dist.get_rank() in members:
            assert isinstance(group, dist.ProcessGroup)
            result = group
    assert result is not None
    return result
