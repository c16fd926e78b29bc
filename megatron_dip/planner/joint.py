"""Plans for several batches at once: one joint problem, and its plan restricted to each batch.

Where ranks of several replicas meet inside a layer (experts divided among them), they must run the
actions of such layers in one order.  So their batches are planned together.  The joint problem
counts as one the largest items of all batches in a module and microbatch, the second largest, and
so on; each takes the most that it costs in any batch, and reads what is read in any.  Its plan
holds for each of the batches: without the items that a batch lacks, an order that respects more
dependencies than there are still respects them, and takes no more time and memory than stated.

Not modelled: which microbatches of different batches would best run together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from megatron_dip.errors import PlanError, shown
from megatron_dip.partition import Partition
from megatron_dip.plan.actions import Action
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.numbers import number_actions
from megatron_dip.plan.plan import Offload, Plan, Recompute, load_plan
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner.planner import estimate_simulation
from megatron_dip.simulator.simulate import simulate
from megatron_dip.workload import HostLink, Item, Problem, StageFactor, SubMicrobatch

__all__ = ["joint_problem", "load_joint_plan", "restrict_plan"]

_NOT_COMPARED = ("item", "needs", "recompute_us", "token_pairs")


def joint_problem(problems: Sequence[Problem]) -> Problem:
    """The problem whose plans can be restricted to each of ``problems``.

    Its items are numbered by size, the largest first.

    Raises:
        PlanError: The problems are not of one model on one machine, or their numbers of
            microbatches differ.
    """
    first = problems[0]
    for number, other in enumerate(problems):
        for name in ("num_ranks", "modules", "transfer", "num_microbatches"):
            given, expected = getattr(other, name), getattr(first, name)
            if given != expected:
                raise PlanError(
                    f"batches cannot be planned together: {name} of batch {number} is "
                    f"{shown(given)}, of batch 0 {shown(expected)} (expected the same model, "
                    f"machine and number of microbatches)"
                )
    limits = zip(*(problem.memory_limit_bytes for problem in problems), strict=True)
    return Problem(
        num_ranks=first.num_ranks,
        memory_limit_bytes=tuple(map(min, limits)),
        transfer=first.transfer,
        modules=first.modules,
        microbatches=tuple(
            _joint_microbatch(problems, number) for number in range(first.num_microbatches)
        ),
        stage_factors=_joint_factors(problems),
        host_link=_joint_link(problems),
    )


def _by_size(problem: Problem, module: str, microbatch: int) -> tuple[Item, ...]:
    """The items of a module, the largest first."""
    items = problem.items(module, microbatch)
    return tuple(sorted(items, key=lambda item: (-item.tokens, item.item)))


def _joint_microbatch(problems: Sequence[Problem], number: int) -> dict[str, tuple[Item, ...]]:
    shares = [_Share(problem, number) for problem in problems]
    joint = {}
    for module in problems[0].modules:
        count = max(len(share.items[module.name]) for share in shares)
        joint[module.name] = tuple(
            _joint_item(
                place,
                [
                    share.translated(module.name, place)
                    for share in shares
                    if share.has(module.name, place)
                ],
            )
            for place in range(count)
        )
    return {name: items for name, items in joint.items() if items}


class _Share:
    """What one batch has in a microbatch, its items numbered by size."""

    def __init__(self, problem: Problem, number: int) -> None:
        self._problem, self._number = problem, number
        self.items = {
            module.name: _by_size(problem, module.name, number) for module in problem.modules
        }
        self._place = {
            (name, item.item): place
            for name, items in self.items.items()
            for place, item in enumerate(items)
        }

    def has(self, module: str, place: int) -> bool:
        return place < len(self.items[module])

    def translated(self, module: str, place: int) -> tuple[Item, dict[str, set[int]]]:
        """An item, and the places of what it reads."""
        item = self.items[module][place]
        needs = {
            upstream: {
                self._place[upstream, needed]
                for needed in self._problem.needed_items(module, self._number, item, upstream)
            }
            for upstream in self._problem.module(module).upstream
        }
        return item, needs


def _joint_item(place: int, same: Sequence[tuple[Item, Mapping[str, set[int]]]]) -> Item:
    """The most that the items cost; what any of them reads."""
    items = [item for item, _ in same]
    needs = {
        upstream: tuple(sorted(set[int]().union(*(needs[upstream] for _, needs in same))))
        for upstream in same[0][1]
    }
    pairs = [item.token_pairs for item in items if item.token_pairs is not None]
    return Item(
        item=place,
        needs=needs or None,
        token_pairs=max(pairs, default=None) if len(pairs) == len(items) else None,
        recompute_us=max(item.effective_recompute_us for item in items),
        **{
            name: max(getattr(item, name) for item in items)
            for name in Item.model_fields
            if name not in _NOT_COMPARED
        },
    )


def _joint_factors(problems: Sequence[Problem]) -> dict[int, StageFactor] | None:
    stages = {stage for problem in problems for stage in problem.stage_factors or {}}
    if not stages:
        return None
    return {
        stage: StageFactor(*map(max, zip(*(_factor(p, stage) for p in problems), strict=True)))
        for stage in sorted(stages)
    }


def _joint_link(problems: Sequence[Problem]) -> HostLink | None:
    """The link that all have, with the least memory behind it.

    Raises:
        PlanError: Their links differ.
    """
    links = [problem.host_link for problem in problems]
    there = [link for link in links if link is not None]
    speeds = {(link.latency_us, link.bytes_per_us) for link in there}
    if not there:
        return None
    if len(there) < len(links) or len(speeds) > 1:
        raise PlanError(
            f"batches cannot be planned together: host_link of batch 0 is {shown(links[0])}, of "
            f"another {shown(next(link for link in links if link != links[0]))} (expected the same "
            f"machine)"
        )
    memory = zip(*(link.memory_bytes for link in there), strict=True)
    return there[0].model_copy(update={"memory_bytes": tuple(map(min, memory))})


def _factor(problem: Problem, stage: int) -> StageFactor:
    return (problem.stage_factors or {}).get(stage, StageFactor())


def load_joint_plan(path: str | Path, partition: Partition) -> Plan:
    """The plan of a joint problem in a file.

    Raises:
        PlanError: It cannot be read, or was made on another partition than ``partition`` or for a
            batch whose items are not numbered as those of joint problems.
    """
    plan = load_plan(path)
    if plan.partition.stages != partition.stages:
        raise PlanError(
            f"{path}: was made on another partition (expected the one of this run: plan again)"
        )
    for name, size in partition.sub_microbatch_tokens.items():
        planned = plan.partition.sub_microbatch_tokens.get(name)
        if planned != size:
            raise PlanError(
                f"{path}: microbatches of {name} are split by the partition that it was made on, "
                f"at {planned} tokens, and not at {size} as this run says (plan again with "
                f"sub_microbatch_tokens in the partition, or leave the size out of the run)"
            )
    if joint_problem([plan.problem]) != plan.problem:
        raise PlanError(
            f"{path}: is the plan of one batch (expected one for several: give `megatron-dip plan` "
            f"more than one --problem)"
        )
    return plan


def restrict_plan(plan: Plan, problem: Problem) -> Plan:
    """The plan for ``problem`` that runs in the order of ``plan``, made for a joint problem.

    Sub-microbatches keep those of their items that ``problem`` has; without any they are dropped,
    with all of their actions and messages.  Everything else stays where it is: two restrictions of
    one plan run what both have in one order.

    Args:
        plan: Of a joint problem of this batch and others, or of others that are not smaller.
        problem: The batch.  That of ``plan`` is not read: it need not be at hand.

    Raises:
        PlanError: ``problem`` has items that ``plan`` has no place for, or reads some that the
            order of ``plan`` makes too late.
        PartitionError: The partition of ``plan`` does not cover ``problem``.
    """
    graph = PipelineGraph(problem, plan.partition, _present(plan, problem))

    def exists(one: Recompute | Offload) -> bool:
        return one.sub < len(graph.subs(plan.partition[one.stage].module, one.microbatch))

    restricted = Plan.of_graph(
        graph,
        _existing(graph, plan.actions),
        recompute=tuple(filter(exists, plan.recompute)),
        offload=tuple(filter(exists, plan.offload)),
        queues=plan.queues,
    )
    validate_plan(restricted)
    estimated = replace(restricted, estimate=estimate_simulation(simulate(restricted)))
    vars(estimated)["graph"] = graph
    return estimated


def _present(plan: Plan, problem: Problem) -> tuple[SubMicrobatch, ...]:
    """The sub-microbatches of ``plan`` that ``problem`` has items for, with these."""
    left = {
        (name, number): dict(enumerate(item.item for item in _by_size(problem, name, number)))
        for number, microbatch in enumerate(problem.microbatches)
        for name in microbatch
    }
    subs = []
    for group in plan.sub_microbatches:
        own = left.get((group.module, group.microbatch), {})
        items = tuple(own.pop(place) for place in group.items if place in own)
        if items:
            subs.append(group._replace(items=items))
    for (name, number), own in sorted(left.items()):
        if own:
            raise PlanError(
                f"the plan has no place for items {sorted(own.values())} of {name} in microbatch "
                f"{number} (expected a batch that is no larger: plan for the joint problem of all "
                f"batches)"
            )
    return tuple(subs)


def _existing(
    graph: PipelineGraph, ranks: Sequence[Sequence[Action]]
) -> tuple[tuple[Action, ...], ...]:
    """``ranks`` without what has no work or no reader in this batch."""
    found = number_actions(graph, ranks)
    exists = (found.number >= 0).tolist()
    return tuple(
        tuple(
            action
            for action, is_there in zip(found.actions[start:end], exists[start:end], strict=True)
            if is_there
        )
        for start, end in pairwise(found.first.tolist())
    )
