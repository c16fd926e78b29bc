"""Cases of ``runtime_program.py``: ranks that agree on a plan, or do not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from runtime_cases import CASE, OTHER_CUT, partition_of, plan_of, rank, report
from runtime_suites import LIMIT_S, PATIENCE_S
from toy_modules import Case

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.errors import ConfigError
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Plan
from megatron_dip.planner import joint_problem, make_plan, pack_plan, sizes_digest
from megatron_dip.runtime import (
    PlanAgreement,
)
from megatron_dip.workload import Problem

Make = Callable[[Problem, Partition], Plan]

OTHER_BATCH = replace(CASE, batch=[*CASE.batch[:1], {"vision": [9], "language": [7]}])
TEXT_ONLY = replace(CASE, batch=[CASE.batch[0], {"language": [7]}])
SIZES = {id(case): case.sizes() for case in (CASE, OTHER_BATCH, TEXT_ONLY)}
"""A batch is known by its object."""


def sizes_of(case: Case) -> BatchSizes:
    return SIZES[id(case)]


def build(sizes: BatchSizes) -> Problem:
    """The problem of the case with these items: all that a rank without data can go by."""
    digest = sizes_digest(sizes)
    cases = (CASE, OTHER_BATCH, TEXT_ONLY)
    return next(one.problem(2) for one in cases if sizes_digest(sizes_of(one)) == digest)


class Agreeing:
    """One pipeline's agreement as this rank sees it; counts the plans that the owner makes."""

    def __init__(
        self,
        case: Case | None = CASE,
        cut: dict[str, list[list[int]]] | None = None,
        make: Make = make_plan,
        limit_s: float = PATIENCE_S,
    ) -> None:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=limit_s), backend="gloo")
        self.case = case
        """The batch of this rank; None where it has no data."""
        self.partition = partition_from_layers(cut or CASE.cut, 2)
        self.agreement = PlanAgreement(self.partition, group)
        self.num_made = self.num_sent = 0
        self._make = make
        send = self.agreement._broadcast

        def counted(packed: Callable[[], bytes]) -> Any:
            self.num_sent += 1
            return send(packed)

        self.agreement._broadcast = counted  # type: ignore[method-assign]

    def made(self, case: Case | None = None) -> bytes:
        self.num_made += 1
        made_for = case or self.case or CASE
        plan = self._make(made_for.problem(2), self.partition)
        return pack_plan(plan, [sizes_of(made_for)])

    def agree(self) -> str:
        """The plan's time and text, and the sizes that came with it."""
        own = None if self.case is None else sizes_of(self.case)
        planned = self.agreement.agree(own, build, self.made)
        assert planned.plan.estimate is not None and planned.sizes is not None
        time_us = planned.plan.estimate.makespan_us
        return f"{time_us} us\n{planned.plan.to_text()}\n{sizes_digest(planned.sizes)}"

    def offer(self, packed: bytes) -> None:
        self.agreement.offer(packed)


def offered() -> list[Any]:
    """Plans that came ahead: used without making one, and again when a step is run again."""
    one = Agreeing()
    one.offer(one.made())
    texts = [one.agree(), one.agree()]
    # Nothing yet; then one that is longer than there is room for, which makes room.
    one.offer(b"")
    one.agreement._capacity_bytes = 8
    one.case = OTHER_BATCH
    one.offer(one.made())
    texts.append(one.agree())
    one.case = CASE
    one.offer(one.made())
    texts.append(one.agree())
    return [one.num_made, texts]


def offered_out_of_turn() -> list[Any]:
    """An evaluation comes between an offer and its use."""
    one = Agreeing()
    one.offer(one.made())
    texts = []
    for case in (OTHER_BATCH, CASE):
        one.case = case
        texts.append(one.agree())
    return [one.num_made, texts]


def without_data() -> list[Any]:
    """Rank 1 has none: plans come ahead, in time, out of turn, and again for the same step."""
    one = Agreeing(None if rank() == 1 else CASE)
    one.offer(one.made(CASE))
    one.agreement._collect()
    prepared = one.agreement.prepare(sizes_of(CASE) if rank() == 0 else None, build)
    texts = []
    for case in (OTHER_BATCH, CASE, CASE, TEXT_ONLY):
        one.case = None if rank() == 1 else case
        texts.append(one.agree())
    one.offer(b"")
    one.case = None if rank() == 1 else CASE
    texts.append(one.agree())
    return [one.num_sent, texts, prepared is not None]


def offered_to_another_batch() -> str:
    """Rank 1 is not where rank 0 is in its data."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.case = OTHER_BATCH
    return one.agree()


def offered_with_damage() -> str:
    """Rank 1 gets what was offered with one byte changed."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.agreement._collect()
        (received,) = one.agreement._offered
        received.packed = with_damage(received.packed)
    return one.agree()


def sent(change: Callable[[bytes], bytes]) -> str:
    """What the owner sends arrives otherwise at rank 1."""
    one = Agreeing()
    send = one.agreement._broadcast

    def changed(make: Callable[[], bytes]) -> Any:
        received = send(make)
        received.packed = change(received.packed)
        return received

    if rank() == 1:
        one.agreement._broadcast = changed  # type: ignore[method-assign]
    return one.agree()


def with_damage(packed: bytes) -> bytes:
    """``packed`` with one byte changed."""
    return packed[:20] + bytes([packed[20] ^ 1]) + packed[21:]


def other_plan(_: bytes) -> bytes:
    """Another correct plan for the same batch."""
    plan = make_plan(
        CASE.problem(2), partition_of(CASE), algorithm="one_f_one_b", split_backward=True
    )
    return pack_plan(plan, [sizes_of(CASE)])


def shared(lies: bool = False) -> list[Any]:
    """Two replicas of a rank each: the second reads a microbatch without images, or ``lies``."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=PATIENCE_S), backend="gloo")
    agreement = PlanAgreement(partition_of(CASE), group, leaders=(0, 1), replica=rank())
    cases = (CASE, TEXT_ONLY)
    sizes = ({"language": [ItemSize(tokens=rank(), spans=(rank(),))]},)
    gathered = agreement.gather([sizes])
    told = [[batch[0]["language"][0].tokens for batch in shares] for shares in gathered]

    def make() -> bytes:
        problems = [case.problem(2) for case in cases]
        plan = make_plan(joint_problem(problems), partition_of(CASE))
        return pack_plan(plan, [sizes_of(case) for case in cases])

    planned = agreement.agree(sizes_of(cases[0 if lies else rank()]), build, make)
    return [told, planned.plan.to_text()]


def fail_with(error: Exception) -> Make:
    def make(*_: Any) -> Plan:
        raise error

    return make


def stuck() -> str:
    """The owner plans until the other rank has ended its wait."""

    def make(*_: Any) -> Plan:
        dist.barrier()
        return plan_of(CASE)

    try:
        return Agreeing(make=make, limit_s=LIMIT_S).agree()
    finally:
        if rank() == 1:
            dist.barrier()


def agreement_suite() -> None:
    report("same everywhere", lambda: Agreeing().agree())
    report("another batch", lambda: Agreeing(OTHER_BATCH if rank() == 1 else CASE).agree())
    report("another partition", lambda: Agreeing(cut=OTHER_CUT if rank() == 1 else None).agree())
    report("offered", offered)
    report("offered out of turn", offered_out_of_turn)
    report("offered to another batch", offered_to_another_batch)
    report("offered with damage", offered_with_damage)
    report("without data", without_data)
    report("damaged plan", lambda: sent(with_damage))
    report("differing plan", lambda: sent(other_plan))
    report("shared", shared)
    report("shared, another batch", lambda: shared(lies=True))
    refusal = ConfigError("no planner for this")
    report("planner refuses", lambda: Agreeing(make=fail_with(refusal)).agree())
    report(
        "planner has a bug", lambda: Agreeing(make=fail_with(ZeroDivisionError("a bug"))).agree()
    )
    report("afterwards", lambda: Agreeing().agree())
    report("planner is stuck", stuck)
