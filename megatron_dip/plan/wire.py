"""The form in which a plan travels to the ranks: compact bytes without problem and partition.

Every rank knows the partition from its configuration and the items of the batch from its own data;
digests of both travel along, so that a rank whose data went another way says so instead of
computing on the wrong batch.  A plan that several replicas share names the batch of each.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence

from megatron_dip.errors import PlanDigestError
from megatron_dip.partition import Partition
from megatron_dip.plan.actions import format_actions, parse_actions
from megatron_dip.plan.plan import Estimate, Plan, Recompute
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["pack_plan", "plan_digest", "unpack_plan"]


def pack_plan(plan: Plan, batch_digests: Sequence[str] = ()) -> bytes:
    """``plan`` as compact bytes; equal plans give equal bytes.

    Args:
        plan: What is to be run.
        batch_digests: Per replica, of its batch, where the plan was made for several together.
    """
    record = {
        "batch_digests": list(batch_digests) or [plan.problem.batch_digest()],
        "partition_digest": plan.partition.digest(),
        "sub_microbatches": plan.sub_microbatches,
        "ranks": [format_actions(actions) for actions in plan.actions],
        "recompute": plan.recompute,
        "estimate": None if plan.estimate is None else plan.estimate.model_dump(mode="json"),
    }
    return zlib.compress(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def plan_digest(packed: bytes) -> str:
    """SHA-256 of a packed plan: what all ranks compare before the first action."""
    return hashlib.sha256(packed).hexdigest()


def unpack_plan(packed: bytes, problem: Problem, partition: Partition, replica: int = 0) -> Plan:
    """The plan in ``packed``, for the batch and partition of this rank.

    One that several replicas share comes as it was made for all of them, without an estimate:
    ``restrict_plan`` makes of it the plan for ``problem``.

    Args:
        packed: What :func:`pack_plan` has made.
        problem: The batch of this rank's replica.
        partition: The cut as this rank is configured.
        replica: Which of those that share the plan.

    Raises:
        PlanDigestError: The plan was made for another batch or another partition.
    """
    record = json.loads(zlib.decompress(packed))
    batches, own_batch = record["batch_digests"], problem.batch_digest()
    batch = batches[replica] if replica < len(batches) else "none"
    for name, given, expected, remedy in (
        ("batch", batch, own_batch, "all ranks of a pipeline must read the same data"),
        (
            "partition",
            record["partition_digest"],
            partition.digest(),
            "all ranks must use the same --dip-config",
        ),
    ):
        if given != expected:
            raise PlanDigestError(
                f"the plan was made for {name} {given[:16]}... but this rank has "
                f"{expected[:16]}... ({remedy})"
            )
    has_estimate = record["estimate"] is not None and len(batches) == 1
    return Plan(
        problem=problem,
        partition=partition,
        sub_microbatches=tuple(
            SubMicrobatch(module, microbatch, sub, tuple(items))
            for module, microbatch, sub, items in record["sub_microbatches"]
        ),
        actions=tuple(parse_actions(line) for line in record["ranks"]),
        recompute=tuple(
            Recompute(stage, microbatch, sub, tuple(layers))
            for stage, microbatch, sub, layers in record["recompute"]
        ),
        estimate=Estimate(**record["estimate"]) if has_estimate else None,
    )
