"""Plans for several batches at once: one joint problem, and its plan restricted to each batch.

Where ranks of several replicas meet inside a layer (experts divided among them), they must run the
actions of such layers in one order.  So their batches are planned together: the joint problem has,
at every microbatch, module and item number, an item if any of the batches has one, with the most
that it costs in any of them, and it reads what is read in any of them.  Its plan holds for each of
the batches: without the items that a batch lacks, an order that respects more dependencies than
there are still respects them, and takes no more time and memory than the joint plan states.

Not modelled: which items of different batches would best share a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from megatron_dip.errors import PlanError
from megatron_dip.plan.actions import Action
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.numbers import number_actions
from megatron_dip.plan.plan import Plan, Recompute
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner.planner import estimate_simulation
from megatron_dip.simulator.simulate import simulate
from megatron_dip.workload import Item, Problem, StageFactor, SubMicrobatch

__all__ = ["joint_problem", "restrict_plan"]

_KEPT = ("item", "needs", "recompute_us")
_SubKey = tuple[str, int, int]
"""Module, microbatch and number of a sub-microbatch."""


def joint_problem(problems: Sequence[Problem]) -> Problem:
    """The problem whose plans can be restricted to each of ``problems``; the only one as it is.

    Items with one number in one module and microbatch count as one.

    Raises:
        PlanError: The problems are not of one model on one machine, or their numbers of
            microbatches differ.
    """
    first = problems[0]
    if len(problems) == 1:
        return first
    for number, other in enumerate(problems):
        for name in ("num_ranks", "modules", "transfer", "num_microbatches"):
            given, expected = getattr(other, name), getattr(first, name)
            if given != expected:
                raise PlanError(
                    f"batches cannot be planned together: {name} of batch {number} is {given!r}, "
                    f"of batch 0 {expected!r} (expected the same model, machine and number of "
                    f"microbatches)"
                )
    limits = zip(*(problem.memory_limit_bytes for problem in problems), strict=True)
    microbatches = tuple(
        {
            name: items
            for name in first.module_order
            if (items := _joint_items(problems, name, number))
        }
        for number in range(first.num_microbatches)
    )
    return Problem(
        num_ranks=first.num_ranks,
        memory_limit_bytes=tuple(map(min, limits)),
        transfer=first.transfer,
        modules=first.modules,
        microbatches=microbatches,
        stage_factors=_joint_factors(problems),
    )


def _joint_items(problems: Sequence[Problem], module: str, microbatch: int) -> tuple[Item, ...]:
    found: dict[int, list[tuple[Problem, Item]]] = {}
    for problem in problems:
        for item in problem.items(module, microbatch):
            found.setdefault(item.item, []).append((problem, item))
    return tuple(
        _joint_item(problems[0].module(module).upstream, module, microbatch, found[number])
        for number in sorted(found)
    )


def _joint_item(
    upstream: Sequence[str], module: str, microbatch: int, same: Sequence[tuple[Problem, Item]]
) -> Item:
    """The most that the items cost; what any of them reads."""
    items = [item for _, item in same]
    values = {
        name: max(getattr(item, name) for item in items)
        for name in Item.model_fields
        if name not in _KEPT
    }
    needs = {
        name: tuple(
            sorted(
                frozenset().union(
                    *(
                        problem.needed_items(module, microbatch, item, name)
                        for problem, item in same
                    )
                )
            )
        )
        for name in upstream
    }
    return Item(
        item=items[0].item,
        needs=needs or None,
        recompute_us=max(item.effective_recompute_us for item in items),
        **values,
    )


def _joint_factors(problems: Sequence[Problem]) -> dict[int, StageFactor] | None:
    stages = {stage for problem in problems for stage in problem.stage_factors or {}}
    if not stages:
        return None
    return {
        stage: StageFactor(*map(max, zip(*(_factor(p, stage) for p in problems), strict=True)))
        for stage in sorted(stages)
    }


def _factor(problem: Problem, stage: int) -> StageFactor:
    return (problem.stage_factors or {}).get(stage, StageFactor())


def restrict_plan(plan: Plan, problem: Problem) -> Plan:
    """The plan for ``problem`` that runs in the order of ``plan``, made for another batch.

    Sub-microbatches keep those of their items that ``problem`` has; without any they are dropped,
    with all of their actions and messages, and those that are left are numbered anew.  Everything
    else stays where it is: two restrictions of one plan run what both have in one order.

    Raises:
        PlanError: ``problem`` has items that ``plan`` has no place for, or reads some that the
            order of ``plan`` makes too late.
        PartitionError: The partition of ``plan`` does not cover ``problem``.
    """
    subs, numbers = _present(plan, problem)
    whole = subs == plan.sub_microbatches
    if whole and plan.problem is problem and plan.estimate is not None:
        return plan
    graph = PipelineGraph(problem, plan.partition, subs)
    keep = partial(_renumbered, plan, numbers)
    restricted = Plan.of_graph(
        graph,
        _existing(graph, [list(_kept(actions, keep)) for actions in plan.actions]),
        recompute=_kept_recompute(plan, numbers),
    )
    validate_plan(restricted)
    estimated = replace(restricted, estimate=estimate_simulation(simulate(restricted)))
    vars(estimated)["graph"] = graph
    return estimated


def _present(plan: Plan, problem: Problem) -> tuple[tuple[SubMicrobatch, ...], dict[_SubKey, int]]:
    """The sub-microbatches of ``plan`` that ``problem`` has, and their new numbers."""
    subs: list[SubMicrobatch] = []
    numbers: dict[_SubKey, int] = {}
    counts: dict[tuple[str, int], int] = {}
    present = {
        (name, number): {item.item for item in items}
        for number, microbatch in enumerate(problem.microbatches)
        for name, items in microbatch.items()
    }
    for group in plan.sub_microbatches:
        share = present.get((group.module, group.microbatch), set())
        items = tuple(item for item in group.items if item in share)
        if not items:
            continue
        share.difference_update(items)
        number = counts.get((group.module, group.microbatch), 0)
        counts[group.module, group.microbatch] = number + 1
        numbers[group.module, group.microbatch, group.sub] = number
        subs.append(SubMicrobatch(group.module, group.microbatch, number, items))
    for (name, number), left in sorted(present.items()):
        if left:
            raise PlanError(
                f"the plan has no place for items {sorted(left)} of {name} in microbatch {number} "
                f"(expected a batch that is no larger: plan for the joint problem of all batches)"
            )
    return tuple(subs), numbers


def _kept(actions: Sequence[Action], keep: Callable[[Action], Action | None]) -> Sequence[Action]:
    return [kept for action in actions if (kept := keep(action)) is not None]


def _renumbered(plan: Plan, numbers: dict[_SubKey, int], action: Action) -> Action | None:
    """``action`` with its new number; None where its sub-microbatch is dropped."""
    if action.microbatch is None:
        return action
    # A message is named by its upstream side, at which it is sent or its gradient received.
    names_peer = action.type.is_receive != action.type.moves_gradient
    stage = action.peer if action.peer is not None and names_peer else action.stage
    number = numbers.get((plan.partition[stage].module, action.microbatch, action.sub))
    return None if number is None else action._replace(sub=number)


def _existing(
    graph: PipelineGraph, ranks: Sequence[Sequence[Action]]
) -> tuple[tuple[Action, ...], ...]:
    """``ranks`` without messages that nobody reads in this batch."""
    found = number_actions(graph, ranks)
    exists = (found.number >= 0).tolist()
    ends = found.first.tolist()
    return tuple(
        tuple(
            action
            for action, is_there in zip(found.actions[start:end], exists[start:end], strict=True)
            if is_there or action.peer is None
        )
        for start, end in pairwise(ends)
    )


def _kept_recompute(plan: Plan, numbers: dict[_SubKey, int]) -> tuple[Recompute, ...]:
    return tuple(
        one._replace(sub=numbers[key])
        for one in plan.recompute
        if (key := (plan.partition[one.stage].module, one.microbatch, one.sub)) in numbers
    )
