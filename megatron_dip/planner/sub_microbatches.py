"""Forming sub-microbatches: a module's items of a microbatch in groups of comparable size."""

import math
from collections.abc import Iterable, Iterator, Mapping

from megatron_dip.errors import PlanError, shown
from megatron_dip.workload import Item, Problem, SubMicrobatch

__all__ = ["TokenLimit", "form_sub_microbatches"]

TokenLimit = int | None | tuple[int | None, ...]
"""Most tokens of a group of one module, in all microbatches or in each; None: not split."""


def form_sub_microbatches(
    problem: Problem, max_tokens: Mapping[str, TokenLimit]
) -> tuple[SubMicrobatch, ...]:
    """Split every module's share of every microbatch into groups of at most ``max_tokens`` tokens.

    Items keep their order.  The groups of a microbatch get about equal numbers of tokens: as many
    groups as the limit makes necessary, each closed when it holds its share.  An item larger than
    the limit is a group of its own.  A module that ``max_tokens`` does not name, or names with
    None, is not split.

    Raises:
        PlanError: ``max_tokens`` names an unknown module, or a limit is below one.
    """
    known = {module.name for module in problem.modules}
    count = problem.num_microbatches
    limits = {
        name: limit if isinstance(limit, tuple) else (limit,) * count
        for name, limit in max_tokens.items()
    }
    for name, of_microbatches in limits.items():
        if name not in known:
            raise PlanError(
                f"max_tokens: unknown module {shown(name)} (expected one of {sorted(known)})"
            )
        for limit in of_microbatches:
            if limit is not None and limit < 1:
                raise PlanError(f"max_tokens of {name}: {limit} (expected at least 1, or None)")
    return tuple(
        SubMicrobatch(name, number, sub, tuple(item.item for item in group))
        for number in range(count)
        for name in problem.module_order
        for sub, group in enumerate(
            _groups(problem.items(name, number), limits[name][number] if name in limits else None)
        )
    )


def _groups(items: tuple[Item, ...], limit: int | None) -> Iterator[list[Item]]:
    if not items:
        return
    if limit is None:
        yield list(items)
        return
    # An item above the limit stands alone; what lies between two such items is shared out evenly.
    run: list[Item] = []
    for item in items:
        if item.tokens > limit:
            yield from _balanced(run, limit)
            yield [item]
            run = []
        else:
            run.append(item)
    yield from _balanced(run, limit)


def _balanced(items: list[Item], limit: int) -> Iterable[list[Item]]:
    """Groups of about equal tokens, none above ``limit``."""
    total = sum(item.tokens for item in items)
    share = total / max(1, math.ceil(total / limit))
    groups: list[list[Item]] = []
    passed = held = 0
    for item in items:
        # An item belongs to the share in which its middle falls, as long as the limit allows.
        in_next_share = passed + item.tokens / 2 > share * len(groups)
        if not groups or in_next_share or held + item.tokens > limit:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.tokens
        passed += item.tokens
    return groups
