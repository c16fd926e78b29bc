"""What is assigned: groups of items that stay together, with what they cost and where they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import ProblemError
from megatron_dip.simulator.arrays import FloatArray, IntArray
from megatron_dip.simulator.bounds import item_work_us
from megatron_dip.workload import Item, Problem

__all__ = ["Groups", "Member", "batch_groups", "item_kept_bytes", "problem_groups"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of items, e.g. samples with their images; G groups, D modules.

    Raises:
        ValueError: Lengths differ, or something is negative or not a number.
    """

    time_us: FloatArray
    """[G, D]: forward and backward in all layers of a module."""
    tokens: IntArray
    """[G, D]: of the module's sequence."""
    kept_bytes: IntArray
    """[G]: from forward to backward, on all ranks of the pipeline together."""
    moved_bytes: IntArray
    """[G]: what it takes to move it; only reported."""
    num_items: IntArray
    """[G]; only reported."""
    replica: IntArray
    """[G]: where it is."""
    microbatch: IntArray
    """[G]: of that replica."""

    def __post_init__(self) -> None:
        num_groups = len(self.replica)
        if self.time_us.shape != self.tokens.shape or self.time_us.ndim != 2:
            raise ValueError(
                f"time_us has shape {self.time_us.shape} and tokens {self.tokens.shape} "
                f"(expected the same: a row per group, a column per module)"
            )
        for name, values in vars(self).items():
            if len(values) != num_groups:
                raise ValueError(f"{name} has {len(values)} rows for {num_groups} groups")
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"{name} has entries below 0 or not finite (expected 0 or more)")


class Member(NamedTuple):
    """An item of a group, as problems know it."""

    replica: int
    microbatch: int
    module: str
    item: int


def problem_groups(problem: Problem, microbatch: int) -> list[list[tuple[str, Item]]]:
    """The items of a microbatch that must stay together, each group in the order of its modules:
    items and those that they read, in one or several steps.

    An item that does not say what it needs of an upstream module reads all of it.
    """
    items = [
        (name, item) for name in problem.module_order for item in problem.items(name, microbatch)
    ]
    number = {(name, item.item): index for index, (name, item) in enumerate(items)}
    leader = list(range(len(items)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for index, (name, item) in enumerate(items):
        for upstream in problem.module(name).upstream:
            for needed in problem.needed_items(name, microbatch, item, upstream):
                first, second = find(index), find(number[upstream, needed])
                leader[max(first, second)] = min(first, second)
    found: dict[int, list[tuple[str, Item]]] = {}
    for index, entry in enumerate(items):
        found.setdefault(find(index), []).append(entry)
    return list(found.values())


def batch_groups(problems: Sequence[Problem]) -> tuple[Groups, list[tuple[Member, ...]]]:
    """The groups of a global batch, a problem per replica, and the items of each.

    What a group's move takes is counted as the bytes that its items hand from layer to layer.

    Raises:
        ProblemError: Problems differ in anything but their microbatches.
    """
    _check_alike(problems)
    first = problems[0]
    names = first.module_order
    works = [item_work_us(first, name) for name in names]
    keeps = [item_kept_bytes(first, name) for name in names]
    column = {name: index for index, name in enumerate(names)}
    members: list[tuple[Member, ...]] = []
    rows: list[tuple[list[float], list[int], int, int]] = []
    for replica, problem in enumerate(problems):
        for microbatch in range(problem.num_microbatches):
            for group in problem_groups(problem, microbatch):
                time_us, tokens = [0.0] * len(names), [0] * len(names)
                kept = moved = 0
                for name, item in group:
                    index = column[name]
                    time_us[index] += works[index](item)
                    tokens[index] += item.tokens
                    kept += keeps[index](item)
                    moved += item.boundary_bytes
                rows.append((time_us, tokens, kept, moved))
                members.append(
                    tuple(Member(replica, microbatch, name, item.item) for name, item in group)
                )
    num_modules = len(names)
    groups = Groups(
        time_us=np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, num_modules),
        tokens=np.array([row[1] for row in rows], dtype=np.int64).reshape(-1, num_modules),
        kept_bytes=np.array([row[2] for row in rows], dtype=np.int64),
        moved_bytes=np.array([row[3] for row in rows], dtype=np.int64),
        num_items=np.array([len(group) for group in members], dtype=np.int64),
        replica=np.array([group[0].replica for group in members], dtype=np.int64),
        microbatch=np.array([group[0].microbatch for group in members], dtype=np.int64),
    )
    return groups, members


def _check_alike(problems: Sequence[Problem]) -> None:
    if not problems:
        raise ProblemError("no problems (expected one per replica)")
    for number, problem in enumerate(problems[1:], start=1):
        for name in type(problem).model_fields:
            if name != "microbatches" and getattr(problem, name) != getattr(problems[0], name):
                raise ProblemError(
                    f"replica {number} has another {name} than replica 0 (expected the same model "
                    f"on the same machines: items are moved between replicas, and their times "
                    f"compared)"
                )


def item_kept_bytes(problem: Problem, name: str) -> Callable[[Item], int]:
    """What an item of module ``name`` keeps from forward to backward in all layers."""
    first = problem.first_with_backward.get(name)
    if first is None:
        return lambda item: 0
    num_layers = len(range(problem.module(name).num_layers)[max(first, 0) :])
    keeps_first = first <= 0

    def kept(item: Item) -> int:
        return (
            num_layers * item.activation_bytes
            + keeps_first * item.first_extra_activation_bytes
            + item.last_extra_activation_bytes
        )

    return kept
