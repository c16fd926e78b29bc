"""One plan on every rank of a pipeline: the owner's plan is broadcast, and all ranks compare.

No rank decides by itself what to run.  A rank whose data, configuration or plan differs makes all
ranks raise the same error before the first action of the iteration.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dip.errors import DipError, PlanDigestError
from megatron_dip.partition import Partition
from megatron_dip.plan import Plan, pack_plan, plan_digest, unpack_plan
from megatron_dip.workload import Problem

__all__ = ["agree_on_plan"]

_DIGEST_BYTES = 32


def agree_on_plan(
    problem: Problem,
    partition: Partition,
    make: Callable[[Problem, Partition], Plan],
    group: dist.ProcessGroup,
) -> Plan:
    """The plan that the owner (first rank of ``group``) makes, the same on all ranks.

    Args:
        problem: The batch as this rank sees it.
        partition: The cut as this rank is configured.
        make: The planner; called by the owner alone.
        group: A CPU group of all ranks that run the plan together.

    Raises:
        PlanDigestError: Some rank has another batch, partition or plan; all ranks raise.
        DipError: The owner's planner failed; all ranks raise.
    """
    is_owner = dist.get_rank(group) == 0
    failure = ""
    packed = b""
    plan: Plan | None = None
    if is_owner:
        try:
            plan = make(problem, partition)
            packed = pack_plan(plan)
        except DipError as error:
            failure = f"{type(error).__name__}: {error}"
    packed, failure = _broadcast(packed, failure, group)
    if failure:
        raise DipError(f"the plan owner could not plan this batch: {failure}")
    problem_here = ""
    if plan is None:
        try:
            plan = unpack_plan(packed, problem, partition)
        except PlanDigestError as error:
            problem_here = str(error)
    _compare(packed if not problem_here else b"", problem_here, group)
    assert plan is not None
    return plan


def _broadcast(packed: bytes, failure: str, group: dist.ProcessGroup) -> tuple[bytes, str]:
    owner = dist.get_global_rank(group, 0)
    message = failure.encode() if failure else packed
    header = torch.tensor([len(message), int(bool(failure))], dtype=torch.int64)
    dist.broadcast(header, owner, group=group)
    payload = torch.empty(int(header[0]), dtype=torch.uint8)
    if dist.get_rank(group) == 0:
        payload.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    dist.broadcast(payload, owner, group=group)
    received = payload.numpy().tobytes()
    return (b"", received.decode()) if int(header[1]) else (received, "")


def _compare(packed: bytes, problem_here: str, group: dist.ProcessGroup) -> None:
    """Raise on every rank unless the digests of all ranks are equal."""
    own = torch.frombuffer(bytearray.fromhex(plan_digest(packed)), dtype=torch.uint8)
    digests = [torch.empty(_DIGEST_BYTES, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(digests, own, group=group)
    differing = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if differing:
        ranks = [dist.get_global_rank(group, rank) for rank in differing]
        raise PlanDigestError(
            f"global ranks {ranks} do not have the owner's plan for this batch; nothing was run"
            + (f" (here: {problem_here})" if problem_here else " (see their messages)")
        )
