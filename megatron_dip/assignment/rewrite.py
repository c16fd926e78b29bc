"""Problems of replicas written anew for an assignment: every item is kept."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_dip.assignment.assign import Assignment
from megatron_dip.assignment.groups import Member
from megatron_dip.workload import Item, Problem

__all__ = ["assigned_problems"]


class _Entry(NamedTuple):
    """An item on its way: what it needs is said by members."""

    member: Member
    item: Item
    needs: dict[str, tuple[Member, ...]]


def assigned_problems(
    problems: Sequence[Problem], members: Sequence[tuple[Member, ...]], assignment: Assignment
) -> list[Problem]:
    """A problem per replica, with the items of ``members`` where ``assignment`` puts them.

    A microbatch that goes as a whole is left as it is.  In others, items keep their numbers where
    no other has the same, and say what they need.

    Args:
        problems: What the groups were made of, see ``batch_groups``.
        members: The items of every group.
        assignment: Of the same groups.
    """
    contents: list[list[list[int]]] = [
        [[] for _ in range(problem.num_microbatches)] for problem in problems
    ]
    places = zip(assignment.replica.tolist(), assignment.microbatch.tolist(), strict=True)
    for group, (replica, microbatch) in enumerate(places):
        contents[replica][microbatch].append(group)
    num_groups: dict[tuple[int, int], int] = {}
    for group_members in members:
        source = group_members[0][:2]
        num_groups[source] = num_groups.get(source, 0) + 1

    def written(here: tuple[int, int], groups: list[int]) -> dict[str, tuple[Item, ...]]:
        sources = {members[group][0][:2] for group in groups}
        if len(sources) == 1:
            (source,) = sources
            if num_groups[source] == len(groups):
                return problems[source[0]].microbatches[source[1]]
        # Items that were here before keep their numbers.
        groups = sorted(groups, key=lambda group: members[group][0][:2] != here)
        return _joined(problems, [member for group in groups for member in members[group]])

    return [
        problem.model_copy(
            update={
                "microbatches": tuple(
                    written((replica, number), groups)
                    for number, groups in enumerate(contents[replica])
                )
            }
        )
        for replica, problem in enumerate(problems)
    ]


def _joined(problems: Sequence[Problem], members: Sequence[Member]) -> dict[str, tuple[Item, ...]]:
    """A microbatch of these items, in the order of their modules."""
    entries = [_entry(problems[member.replica], member) for member in members]
    number = _numbers(members)
    found: dict[str, tuple[Item, ...]] = {}
    for name in problems[0].module_order:
        items = []
        for entry in entries:
            if entry.member.module == name:
                needs = {
                    upstream: tuple(sorted(number[needed] for needed in all_needed))
                    for upstream, all_needed in entry.needs.items()
                }
                items.append(
                    entry.item.model_copy(
                        update={"item": number[entry.member], "needs": needs or None}
                    )
                )
        if items:
            found[name] = tuple(items)
    return found


def _entry(problem: Problem, member: Member) -> _Entry:
    item = problem.item(member.module, member.microbatch, member.item)
    needs = {
        upstream: tuple(
            member._replace(module=upstream, item=number)
            for number in problem.needed_items(member.module, member.microbatch, item, upstream)
        )
        for upstream in problem.module(member.module).upstream
    }
    return _Entry(member, item, needs)


def _numbers(members: Sequence[Member]) -> dict[Member, int]:
    """Unique within every module: the old ones where they are free, else the smallest that is."""
    found: dict[Member, int] = {}
    for name in dict.fromkeys(member.module for member in members):
        own = [member for member in members if member.module == name]
        taken: set[int] = set()
        late = []
        for member in own:
            if member.item in taken:
                late.append(member)
            else:
                taken.add(member.item)
                found[member] = member.item
        free = 0
        for member in late:
            while free in taken:
                free += 1
            taken.add(free)
            found[member] = free
    return found
