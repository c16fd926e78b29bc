"""The form in which a plan travels to the ranks: compact bytes, with the sizes of its items.

Every rank knows the partition and the costs from its configuration; a digest of the partition
travels along.  The sizes of the items travel inside the plan, those of every replica that shares
it, so that a rank without data needs nothing else.  A rank that has data compares them with its
own: one whose data went another way says so instead of computing on the wrong batch.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.errors import PlanDigestError
from megatron_dip.partition import Partition
from megatron_dip.plan import (
    Estimate,
    Offload,
    Plan,
    QueueModel,
    Recompute,
    format_actions,
    parse_actions,
)
from megatron_dip.planner.joint import restrict_plan
from megatron_dip.planner.planned import PlannedBatch
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["Build", "pack_plan", "plan_digest", "sizes_digest", "unpack_plan"]

Build = Callable[[BatchSizes], Problem]
"""Makes the problem of a batch, as ``ProblemBuilder.build`` does."""


def pack_plan(plan: Plan, replicas: Sequence[BatchSizes]) -> bytes:
    """``plan`` as compact bytes; equal plans for equal items give equal bytes.

    Args:
        plan: What is to be run.
        replicas: The items of each replica that it was made for.
    """
    record = {
        "replicas": [_sizes_record(sizes) for sizes in replicas],
        "partition_digest": plan.partition.digest(),
        "sub_microbatches": plan.sub_microbatches,
        "ranks": [format_actions(actions) for actions in plan.actions],
        "recompute": plan.recompute,
        "offload": plan.offload,
        "estimate": None if plan.estimate is None else plan.estimate.model_dump(mode="json"),
        "communicators": None if plan.queues is None else plan.queues.communicators,
    }
    return zlib.compress(_text(record).encode())


def plan_digest(packed: bytes) -> str:
    """SHA-256 of a packed plan: what all ranks compare before the first action."""
    return hashlib.sha256(packed).hexdigest()


def sizes_digest(sizes: BatchSizes) -> str:
    """SHA-256 of sizes: equal where two ranks read the same batch."""
    return _digest(_sizes_record(sizes))


def unpack_plan(
    packed: bytes,
    build: Build,
    partition: Partition,
    *,
    replica: int = 0,
    own: BatchSizes | None = None,
) -> PlannedBatch:
    """The plan in ``packed`` as one replica runs it.

    Args:
        packed: What :func:`pack_plan` has made.
        build: Makes the replica's problem.
        partition: The cut as this rank is configured.
        replica: Which of those that share the plan.
        own: The items of this rank's own batch, where it has data.

    Raises:
        PlanDigestError: The plan was made for another batch or another partition.
        PlanError: The plan of several replicas has no place for what is in this one.
    """
    record = json.loads(zlib.decompress(packed))
    replicas = record["replicas"]
    if own is not None:
        _check("batch", _digest(replicas[replica]), sizes_digest(own), _OTHER_DATA)
    _check("partition", record["partition_digest"], partition.digest(), _OTHER_CONFIG)
    sizes = _parse_sizes(replicas[replica]) if own is None else own
    problem = build(sizes)
    communicators = record["communicators"]
    has_estimate = record["estimate"] is not None and len(replicas) == 1
    plan = Plan(
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
        offload=tuple(
            Offload(stage, microbatch, sub, tuple(layers))
            for stage, microbatch, sub, layers in record["offload"]
        ),
        estimate=Estimate(**record["estimate"]) if has_estimate else None,
        queues=None if communicators is None else QueueModel(communicators=communicators),
    )
    return PlannedBatch(plan if len(replicas) == 1 else restrict_plan(plan, problem), sizes)


_OTHER_DATA = "all ranks of a pipeline must read the same data"
_OTHER_CONFIG = "all ranks must use the same --dip-config"


def _check(name: str, given: str, expected: str, remedy: str) -> None:
    if given != expected:
        raise PlanDigestError(
            f"the plan was made for {name} {given[:16]}... but this rank has "
            f"{expected[:16]}... ({remedy})"
        )


def _text(record: object) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _digest(record: object) -> str:
    return hashlib.sha256(_text(record).encode()).hexdigest()


def _sizes_record(sizes: BatchSizes) -> list[dict[str, list[tuple[Any, ...]]]]:
    return [
        {module: [_item_record(size) for size in items] for module, items in microbatch.items()}
        for microbatch in sizes
    ]


def _item_record(size: ItemSize) -> tuple[Any, ...]:
    return (
        size.tokens,
        size.spans,
        size.context_tokens,
        dict(size.needs),
        size.output_tokens,
        size.loss_tokens,
        size.context_loss_tokens,
    )


def _parse_sizes(record: Sequence[Mapping[str, Sequence[Any]]]) -> BatchSizes:
    return tuple(
        {
            module: tuple(_parse_item(*item) for item in items)
            for module, items in microbatch.items()
        }
        for microbatch in record
    )


def _parse_item(
    tokens: int,
    spans: Sequence[int],
    context_tokens: int,
    needs: Mapping[str, Sequence[int]],
    output_tokens: int | None,
    loss_tokens: int,
    context_loss_tokens: Sequence[int],
) -> ItemSize:
    return ItemSize(
        tokens=tokens,
        spans=tuple(spans),
        context_tokens=context_tokens,
        needs={module: tuple(items) for module, items in needs.items()},
        output_tokens=output_tokens,
        loss_tokens=loss_tokens,
        context_loss_tokens=tuple(context_loss_tokens),
    )
