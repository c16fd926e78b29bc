"""One plan on every rank of a pipeline: the owner's plan is broadcast, and all ranks compare.

No rank decides by itself what to run.  A rank whose data, configuration or plan differs makes all
ranks raise the same error before the first action of the iteration.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dip.errors import ChannelError, PlanDigestError, PlanningError
from megatron_dip.partition import Partition
from megatron_dip.plan import Plan, pack_plan, plan_digest, unpack_plan
from megatron_dip.runtime.channels import transfer_failure_reason
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
        PlanningError: The owner's planner failed, in whatever way; all ranks raise.
        ChannelError: A rank has died, or does not answer within the group's time limit.
    """
    packed, plan, failure = b"", None, ""
    mistake: Exception | None = None
    is_owner = dist.get_rank(group) == 0
    if is_owner:
        try:
            plan = make(problem, partition)
            packed = pack_plan(plan)
        # Whatever it is, the other ranks are waiting and must hear of it.
        except Exception as error:
            mistake = error
            failure = f"{type(error).__name__}: {error}"
    try:
        packed, failure = _broadcast(packed, failure, group)
        if failure:
            raise PlanningError(f"the plan owner could not plan this batch: {failure}") from mistake
        difference = ""
        if plan is None:
            plan, difference = _unpack(packed, problem, partition)
        _compare(packed, difference, group)
    except RuntimeError as error:
        raise ChannelError(
            f"agreeing on a plan failed on global rank {dist.get_rank()}: "
            f"{transfer_failure_reason(error)}"
        ) from error
    assert plan is not None
    return plan


def _unpack(packed: bytes, problem: Problem, partition: Partition) -> tuple[Plan | None, str]:
    """The plan for this rank's batch, or why it cannot be had."""
    try:
        return unpack_plan(packed, problem, partition), ""
    except PlanDigestError as error:
        return None, str(error)
    # Damaged bytes fail in any of the steps from bytes to actions.
    except Exception as error:
        return None, f"the plan arrived damaged ({type(error).__name__}: {error})"


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


def _compare(packed: bytes, difference: str, group: dist.ProcessGroup) -> None:
    """Raise the same error on every rank unless all have the owner's plan, for the same batch.

    Args:
        packed: The plan as it arrived here.
        difference: Why it is none for this rank; empty where it is.
    """
    digest = "" if difference else plan_digest(packed)
    own = torch.frombuffer(bytearray.fromhex(digest or "00" * _DIGEST_BYTES), dtype=torch.uint8)
    digests = [torch.empty(_DIGEST_BYTES, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(digests, own, group=group)
    differing = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if not differing:
        return
    # All ranks know of it now, so that all take part in this second, slow exchange.
    differences: list[str] = [""] * group.size()
    dist.all_gather_object(differences, difference, group=group)
    reason = differences[differing[0]] or "its bytes differ from the owner's"
    ranks = [dist.get_global_rank(group, rank) for rank in differing]
    raise PlanDigestError(
        f"global ranks {ranks} do not have the owner's plan for this batch; nothing was run "
        f"(rank {ranks[0]}: {reason})"
    )
