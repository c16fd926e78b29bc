"""Actions as numbers, and back.

A *task* is a compute action as a number: with N works, task n is the forward of work n, N + n its
backward (or input gradient), 2 N + n its weight gradient.  In the order of a rank its copies stand
among them, as 3 N + n (``OFFLOAD``), 4 N + n (``RELEASE``) and 5 N + n (``RELOAD``).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PlanError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.collector import without_collection
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.wiring import IntArray, Wiring

__all__ = [
    "BACKWARD_KIND",
    "FORWARD_KIND",
    "OFFLOAD_KIND",
    "RELEASE_KIND",
    "RELOAD_KIND",
    "TYPE_NUMBERS",
    "WEIGHT_KIND",
    "ActionNumbers",
    "decode_tasks",
    "encode_tasks",
    "number_actions",
]

FORWARD_KIND, BACKWARD_KIND, WEIGHT_KIND, OFFLOAD_KIND, RELEASE_KIND, RELOAD_KIND = range(6)
"""A task's number divided by the number of works."""

TYPE_NUMBERS = {kind: number for number, kind in enumerate(ActionType)}
"""``F B I W`` are 0 to 3, sends and receives 4 to 7, ``REDUCE_GRAD`` is 8, ``OFFLOAD RELEASE
RELOAD`` are 9 to 11."""

_KINDS = np.array([0, 1, 1, 2, -1, -1, -1, -1, -1, 3, 4, 5])
"""Of the types; -1 for those that are no tasks."""
_TYPES = np.array([0, 1, 3, 9, 10, 11])
"""Of the kinds."""

_ABSENT = np.iinfo(np.int64).min
"""Stands for None: no action names it."""


class ActionNumbers(NamedTuple):
    """The actions of all ranks, one rank after the other; T in all."""

    actions: list[Action]
    first: IntArray
    """[num_ranks + 1]: rank r has the actions first[r] to first[r + 1]."""
    rank: IntArray
    """[T]: of the list that the action stands in."""
    type: IntArray
    """[T]: see ``TYPE_NUMBERS``."""
    place: IntArray
    """[T]: of the stage, as in :class:`Wiring`; -1 where there is none of that number."""
    number: IntArray
    """[T]: of the work (computing and copies), message (transfer) or place (``REDUCE_GRAD``); -1
    where the batch has none like that."""


@without_collection()
def number_actions(graph: PipelineGraph, ranks: Sequence[Sequence[Action]]) -> ActionNumbers:
    """Find what every action of ``ranks`` means in ``graph``.

    Raises:
        PlanError: An action names a number beyond 64 bits.
    """
    actions = list(itertools.chain.from_iterable(ranks))
    lengths = [len(line) for line in ranks]
    try:
        stage, kinds, microbatch, sub, peer = _columns(actions)
    except OverflowError as error:
        raise PlanError(f"an action names a number beyond 64 bits ({error})") from None
    wiring = graph.wiring
    stage_place, peer_place = _places(graph, stage), _places(graph, peer)
    # A message is named by its upstream side, at which it is sent or its gradient received.
    names_peer = (kinds == _RECV_FORWARD) | (kinds == _SEND_BACKWARD)
    upstream = np.where(names_peer, peer_place, stage_place)
    downstream = np.where(names_peer, stage_place, peer_place)
    number = _works(wiring, upstream, microbatch, sub)
    number[(_KINDS[kinds] >= 0) & (peer != _ABSENT)] = -1
    moves = np.flatnonzero((kinds >= _SEND_FORWARD) & (kinds < _REDUCE))
    number[moves] = _messages(wiring, number[moves], downstream[moves])
    reduces = kinds == _REDUCE
    number[reduces] = np.where(microbatch == _ABSENT, stage_place, -1)[reduces]
    return ActionNumbers(
        actions=actions,
        first=np.cumsum([0, *lengths]),
        rank=np.repeat(np.arange(len(lengths)), lengths),
        type=kinds,
        place=stage_place,
        number=number,
    )


def encode_tasks(kinds: IntArray, number: IntArray, num_works: int) -> IntArray:
    """Numbers of the tasks with these types and works; -1 for actions that are no tasks."""
    kind = _KINDS[kinds]
    return np.where(kind >= 0, number + num_works * kind, -1)


@without_collection()
def decode_tasks(graph: PipelineGraph, tasks: IntArray) -> list[Action]:
    """The actions with these numbers; backwards whose ``W`` is among them are halves."""
    wiring = graph.wiring
    num_works = len(wiring.stage)
    kind, number = np.divmod(tasks, num_works)
    is_half = ~wiring.has_weight_grad
    is_half[number[kind == WEIGHT_KIND]] = True
    types = _TYPES[kind] + ((kind == BACKWARD_KIND) & is_half[number])
    return list(
        map(
            Action._make,
            zip(
                wiring.stage[number].tolist(),
                map(tuple(ActionType).__getitem__, types.tolist()),
                wiring.microbatch[number].tolist(),
                wiring.sub[number].tolist(),
                itertools.repeat(None),
            ),
        )
    )


_SEND_FORWARD = TYPE_NUMBERS[ActionType.SEND_FORWARD]
_RECV_FORWARD = TYPE_NUMBERS[ActionType.RECV_FORWARD]
_SEND_BACKWARD = TYPE_NUMBERS[ActionType.SEND_BACKWARD]
_REDUCE = TYPE_NUMBERS[ActionType.REDUCE_GRAD]


def _columns(actions: Sequence[Action]) -> tuple[IntArray, ...]:
    """Stage, number of the type, microbatch, sub, peer."""
    stage, kinds, microbatch, sub, peer = zip(*actions, strict=True) if actions else [()] * 5
    return tuple(
        np.array(column, dtype=np.int64)
        for column in (
            stage,
            [TYPE_NUMBERS[kind] for kind in kinds],
            [_ABSENT if number is None else number for number in microbatch],
            sub,
            [_ABSENT if number is None else number for number in peer],
        )
    )


def _places(graph: PipelineGraph, stage: IntArray) -> IntArray:
    """Places of stages by their numbers; -1 where there is none."""
    numbers = np.array([stage.stage for stage in graph.stages])
    by_number = np.argsort(numbers)
    found = np.searchsorted(numbers, stage, sorter=by_number)
    places = by_number[np.minimum(found, len(numbers) - 1)]
    return np.where(numbers[places] == stage, places, -1)


def _works(wiring: Wiring, place: IntArray, microbatch: IntArray, sub: IntArray) -> IntArray:
    """Numbers of works; -1 where there is none."""
    num_microbatches = wiring.first_work.shape[1]
    exists = (place >= 0) & (microbatch >= 0) & (microbatch < num_microbatches) & (sub >= 0)
    line = np.where(exists, place * num_microbatches + microbatch, 0)
    exists &= sub < wiring.num_subs.ravel()[line]
    return np.where(exists, wiring.first_work.ravel()[line] + sub, -1)


def _messages(wiring: Wiring, work: IntArray, target: IntArray) -> IntArray:
    """Numbers of the messages that ``work`` makes for the stages at ``target``; -1 where none."""
    number = np.full(len(work), -1)
    for step in range(int(np.diff(wiring.first_message).max(initial=0))):
        message = np.where(work >= 0, wiring.first_message[work] + step, len(wiring.target))
        exists = message < wiring.first_message[work + 1]
        exists[exists] = wiring.target[message[exists]] == target[exists]
        number[exists] = message[exists]
    return number
