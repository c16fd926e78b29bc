"""Lowering: from the order in which ranks compute to everything that they do.

The input is a *completion order*: all compute actions in one sequence that respects the
dependencies and has every rank's actions in the order in which it runs them (the simulator gives
one).  Every action of the plan gets a place in that sequence: a message directly after the last
action that contributes to it, a ``REDUCE_GRAD`` after the last backward of its stage.  A rank's
list is its actions by place, and a receive stands at the place of its send.  From this follows all
that matters:

- a receive is posted before the first action of its rank that ends after the message is ready,
  that is ahead of its arrival, and before everything that reads it;
- two messages between the same ranks stand in the same order on both sides;
- the plan cannot deadlock even where a send waits for its receive, because every list is sorted
  by one and the same sequence.

Copies to and from the host stand where the order of their rank has them: between the same two
computing actions, behind messages that are ready there.

For ranks with one hardware queue receives are then placed anew, see
:mod:`megatron_dip.plan.placing`.
"""

from collections.abc import Iterator
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PlanError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.collector import without_collection
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.numbers import TYPE_NUMBERS, decode_tasks
from megatron_dip.plan.placing import rearranged
from megatron_dip.plan.queues import ActionLists
from megatron_dip.plan.wiring import IntArray, Wiring

__all__ = ["Lowered", "canonical_reduce_order", "lower", "lower_lists"]

# What stands at one place of the sequence: first the computing, then its messages, so that they
# leave at once, then copies, then gradient reductions.
_COMPUTE, _MESSAGE, _COPY, _REDUCE = range(4)


class Lowered(NamedTuple):
    """What the ranks do, in their order; T actions in all."""

    actions: list[Action]
    """[T]: in any order."""
    chosen: IntArray
    """[T]: of the action in ``actions`` that stands at a place of the lists."""
    lists: ActionLists

    def arranged(self, order: IntArray) -> "Lowered":
        """The same with the actions of every rank in another order."""
        return Lowered(self.actions, self.chosen[order], rearranged(self.lists, order))

    def ranks(self) -> tuple[tuple[Action, ...], ...]:
        """The actions of every rank."""
        chosen, ends = self.chosen.tolist(), self.lists.first.tolist()
        return tuple(
            tuple([self.actions[number] for number in chosen[start:end]])
            for start, end in pairwise(ends)
        )


class _Entries(NamedTuple):
    """Some actions of the plan, in any order."""

    actions: list[Action]
    type: IntArray
    """See ``TYPE_NUMBERS``."""
    number: IntArray
    """See :class:`ActionLists`."""
    rank: IntArray
    place: IntArray
    """In the sequence; -1 for what goes before everything."""
    kind: int
    """What goes first at the same place; then the smaller ``tie``."""
    tie: IntArray


def canonical_reduce_order(graph: PipelineGraph, rank: int) -> tuple[int, ...]:
    """Trainable stages of ``rank`` in the order in which their gradients are reduced.

    It depends on the partition alone: replicas with different plans share the data-parallel group
    and must issue its collectives in one order.  Modules are in reverse topological order, stages
    of a module in reverse order of the chain, which is about the order in which backwards end.
    """
    return tuple(
        stage.stage
        for module in reversed(graph.problem.module_order)
        for stage in reversed(graph.partition.chains[module])
        if stage.rank == rank and graph.has_weight_grad(stage.stage)
    )


def lower(
    graph: PipelineGraph, completion_order: IntArray, rank_order: IntArray | None = None
) -> tuple[tuple[Action, ...], ...]:
    """The complete actions of every rank; see :func:`lower_lists`."""
    return lower_lists(graph, completion_order, rank_order).ranks()


@without_collection()
def lower_lists(
    graph: PipelineGraph, completion_order: IntArray, rank_order: IntArray | None = None
) -> Lowered:
    """All that ranks do: computing, transfers, copies and gradient reductions.

    Args:
        graph: The dependencies of the batch.
        completion_order: Tasks (see :mod:`megatron_dip.plan.numbers`) in one sequence that respects
            dependencies and the order of every rank, e.g. ``Simulation.completion_order``.
        rank_order: The tasks of every rank, one rank after the other, with copies among them; there
            are none where it is None.

    Raises:
        PlanError: Nobody computes what a message sends.
    """
    wiring = graph.wiring
    num_works = len(wiring.stage)
    place = np.full(3 * num_works, -1)
    place[completion_order] = np.arange(len(completion_order))
    entries = [
        _Entries(
            actions=(computing := decode_tasks(graph, completion_order)),
            type=np.array([TYPE_NUMBERS[action.type] for action in computing], dtype=np.int64),
            number=completion_order % num_works,
            rank=wiring.rank[completion_order % num_works],
            place=place[completion_order],
            kind=_COMPUTE,
            tie=np.zeros_like(completion_order),
        ),
        *_transfers(wiring, place),
        *(() if rank_order is None else [_copies(graph, rank_order, place)]),
        *(_reductions(graph, rank, place) for rank in range(graph.problem.num_ranks)),
    ]
    # One number that sorts by place, kind and tie: all are small.
    num_ties = 1 + max(int(entry.tie.max(initial=0)) for entry in entries)
    keys = np.concatenate([((e.place + 1) * 4 + e.kind) * num_ties + e.tie for e in entries])
    rank = np.concatenate([entry.rank for entry in entries])
    order = np.argsort(rank * (keys.max(initial=0) + 1) + keys)
    ends = np.cumsum(np.bincount(rank, minlength=graph.problem.num_ranks))
    lists = ActionLists(
        first=np.concatenate([[0], ends]),
        rank=rank[order],
        type=np.concatenate([entry.type for entry in entries])[order],
        number=np.concatenate([entry.number for entry in entries])[order],
    )
    return Lowered([action for entry in entries for action in entry.actions], order, lists)


def _transfers(wiring: Wiring, place: IntArray) -> Iterator[_Entries]:
    """Both sides of every message between ranks, at the place of its last contributor."""
    num_works = len(wiring.stage)
    gradient_place = np.array([], dtype=np.int64)
    if len(wiring.reader):
        # A gradient is there when all readers of the forward message have added theirs.
        ends = place[num_works + wiring.reader]
        made = np.minimum.reduceat(ends, wiring.first_reader[:-1]) >= 0
        gradient_place = np.maximum.reduceat(ends, wiring.first_reader[:-1])
        gradient_place[~made] = -1
    both_ways = (
        (wiring.crosses, place[wiring.source], ActionType.SEND_FORWARD, ActionType.RECV_FORWARD),
        (
            wiring.crosses & wiring.has_gradient,
            gradient_place,
            ActionType.SEND_BACKWARD,
            ActionType.RECV_BACKWARD,
        ),
    )
    for direction, (moves, ready, send, receive) in enumerate(both_ways):
        messages = np.flatnonzero(moves)
        source, target = wiring.source[messages], wiring.target[messages]
        upstream = (wiring.stage[source].tolist(), wiring.rank[source])
        downstream = (wiring.place_stage[target].tolist(), wiring.place_rank[target])
        sender, receiver = (upstream, downstream) if direction == 0 else (downstream, upstream)
        names = (wiring.microbatch[source].tolist(), wiring.sub[source].tolist())
        for kind, (stages, rank), (peers, _) in (
            (send, sender, receiver),
            (receive, receiver, sender),
        ):
            actions = list(
                map(Action._make, zip(stages, repeat(kind), *names, peers, strict=False))
            )
            if kind is send and (ready[messages] < 0).any():
                odd = actions[int(np.argmin(ready[messages]))]
                raise PlanError(f"{odd} has nothing to send: no rank runs what makes it")
            yield _Entries(
                actions=actions,
                type=np.full_like(messages, TYPE_NUMBERS[kind]),
                number=messages,
                rank=rank,
                place=ready[messages],
                kind=_MESSAGE,
                tie=2 * messages + direction,
            )


def _copies(graph: PipelineGraph, rank_order: IntArray, place: IntArray) -> _Entries:
    """Copies behind the computing that they stand behind on their rank."""
    wiring = graph.wiring
    num_works = len(wiring.stage)
    is_copy = rank_order >= 3 * num_works
    index = np.arange(len(rank_order))
    computing = np.maximum.accumulate(np.where(is_copy, -1, index))[is_copy]
    tasks = rank_order[is_copy]
    actions = decode_tasks(graph, tasks)
    return _Entries(
        actions=actions,
        type=np.array([TYPE_NUMBERS[action.type] for action in actions], dtype=np.int64),
        number=tasks % num_works,
        rank=wiring.rank[tasks % num_works],
        place=place[rank_order[computing]],
        kind=_COPY,
        tie=index[is_copy],
    )


def _reductions(graph: PipelineGraph, rank: int, place: IntArray) -> _Entries:
    """``REDUCE_GRAD`` in the canonical order, each as early as that and its backwards allow."""
    wiring = graph.wiring
    stages = canonical_reduce_order(graph, rank)
    places = {stage.stage: place for place, stage in enumerate(graph.stages)}
    is_here = wiring.rank == rank
    # The places of the backwards and weight gradients of this rank, by stage.
    ends = np.where(is_here, place.reshape(3, -1)[1:].max(axis=0), -1)
    last = [int(ends[wiring.stage == stage].max(initial=-1)) for stage in stages]
    return _Entries(
        actions=[Action(stage, ActionType.REDUCE_GRAD) for stage in stages],
        type=np.full(len(stages), TYPE_NUMBERS[ActionType.REDUCE_GRAD]),
        number=np.array([places[stage] for stage in stages], dtype=np.int64),
        rank=np.full(len(stages), rank),
        place=np.maximum.accumulate(np.array(last, dtype=np.int64)),
        kind=_REDUCE,
        tie=np.arange(len(stages)),
    )
