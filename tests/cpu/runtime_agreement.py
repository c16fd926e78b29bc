"""Cases of ``runtime_program.py``: ranks that agree on a plan, or do not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from runtime_cases import CASE, OTHER_CUT, partition_of, plan_of, rank, report
from runtime_suites import LIMIT_S, PATIENCE_S
from toy_modules import Case

from megatron_dip.costs import ItemSize
from megatron_dip.errors import ConfigError
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Plan, pack_plan
from megatron_dip.planner import joint_problem, make_plan
from megatron_dip.runtime import (
    PlanAgreement,
)
from megatron_dip.workload import Problem

Make = Callable[[Problem, Partition], Plan]

OTHER_BATCH = replace(CASE, batch=[*CASE.batch[:1], {"vision": [9], "language": [7]}])


class Agreeing:
    """One pipeline's agreement as this rank sees it; counts the plans that the owner makes."""

    def __init__(
        self,
        case: Case = CASE,
        cut: dict[str, list[list[int]]] | None = None,
        make: Make = make_plan,
        limit_s: float = PATIENCE_S,
    ) -> None:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=limit_s), backend="gloo")
        self.problem = case.problem(2)
        self.partition = partition_from_layers(cut or case.cut, 2)
        self.agreement = PlanAgreement(self.partition, group)
        self.num_made = 0
        self._make = make

    def made(self) -> bytes:
        self.num_made += 1
        return pack_plan(self._make(self.problem, self.partition))

    def agree(self, problem: Problem | None = None) -> str:
        """The plan's time and text."""
        plan = self.agreement.agree(problem or self.problem, self.made)
        assert plan.estimate is not None
        return f"{plan.estimate.makespan_us} us\n{plan.to_text()}"

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
    one.problem = OTHER_BATCH.problem(2)
    other = one.made()
    one.offer(other)
    texts.append(one.agree())
    one.problem = CASE.problem(2)
    one.offer(one.made())
    texts.append(one.agree())
    return [one.num_made, texts]


def offered_out_of_turn() -> list[Any]:
    """An evaluation comes between an offer and its use."""
    one = Agreeing()
    training, evaluation = one.problem, OTHER_BATCH.problem(2)
    one.offer(one.made())
    one.problem = evaluation
    texts = [one.agree(evaluation), one.agree(training)]
    return [one.num_made, texts]


def offered_to_another_batch() -> str:
    """Rank 1 is not where rank 0 is in its data."""
    one = Agreeing()
    one.offer(one.made())
    return one.agree(OTHER_BATCH.problem(2) if rank() == 1 else None)


def offered_with_damage() -> str:
    """Rank 1 gets what was offered with one byte changed."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.agreement._collect()
        (received,) = one.agreement._offered
        packed = received.packed
        received.packed = packed[:20] + bytes([packed[20] ^ 1]) + packed[21:]
    return one.agree()


def differing_plan() -> str:
    """Rank 1 holds another correct plan for the same batch."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.agreement._collect()
        (received,) = one.agreement._offered
        received.packed = pack_plan(
            make_plan(one.problem, one.partition, algorithm="one_f_one_b", split_backward=True)
        )
    return one.agree()


def shared(lies: bool = False) -> list[Any]:
    """Two replicas of a rank each: the second reads a microbatch without images, or ``lies``."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=PATIENCE_S), backend="gloo")
    agreement = PlanAgreement(partition_of(CASE), group, leaders=(0, 1), replica=rank())
    text_only = replace(CASE, batch=[CASE.batch[0], {"language": [7]}])
    problems = [CASE.problem(2), text_only.problem(2)]
    sizes = ({"language": [ItemSize(tokens=rank(), spans=(rank(),))]},)
    gathered = agreement.gather([sizes])
    told = [[batch[0]["language"][0].tokens for batch in shares] for shares in gathered]

    def make() -> bytes:
        plan = make_plan(joint_problem(problems), partition_of(CASE))
        return pack_plan(plan, [problem.batch_digest() for problem in problems])

    plan = agreement.agree(problems[0 if lies else rank()], make)
    return [told, plan.to_text()]


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
    report("differing plan", differing_plan)
    report("shared", shared)
    report("shared, another batch", lambda: shared(lies=True))
    refusal = ConfigError("no planner for this")
    report("planner refuses", lambda: Agreeing(make=fail_with(refusal)).agree())
    report(
        "planner has a bug", lambda: Agreeing(make=fail_with(ZeroDivisionError("a bug"))).agree()
    )
    report("afterwards", lambda: Agreeing().agree())
    report("planner is stuck", stuck)
