"""Lowering: from the order in which ranks compute to everything that they do.

The input is a compute order and a *completion order*: all compute actions in one sequence that
respects the dependencies and every rank's order (the simulator gives one).  Every action of the
plan gets a place in that sequence: a message directly after the last action that contributes to
it, a ``REDUCE_GRAD`` after the last backward of its stage.  A rank's list is its actions by place,
and a receive stands at the place of its send.  From this follows all that matters:

- a receive is posted before the first action of its rank that ends after the message is ready,
  that is ahead of its arrival, and before everything that reads it;
- two messages between the same ranks stand in the same order on both sides;
- the plan cannot deadlock even where a send waits for its receive, because every list is sorted
  by one and the same sequence.
"""

from collections.abc import Iterator, Sequence

from megatron_dip.errors import PlanError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.graph import Message, PipelineGraph, Work

__all__ = ["BACKWARD_TYPES", "canonical_reduce_order", "cross_rank_messages", "lower"]

BACKWARD_TYPES = frozenset({ActionType.BACKWARD, ActionType.INPUT_GRAD, ActionType.WEIGHT_GRAD})
"""Compute types of a backward and its halves."""

# What stands at one place of the sequence: first the computing, then its messages, so that they
# leave at once, then gradient reductions.
_COMPUTE, _MESSAGE, _REDUCE = range(3)
_Key = tuple[int, int, int]


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
    graph: PipelineGraph,
    compute_order: Sequence[Sequence[Action]],
    completion_order: Sequence[Action],
) -> tuple[tuple[Action, ...], ...]:
    """The complete actions of every rank: computing, transfers and gradient reductions.

    Args:
        graph: The dependencies of the batch.
        compute_order: Per rank, its compute actions in order.
        completion_order: The same actions in one sequence that respects dependencies and the order
            of every rank, e.g. ``Simulation.completion_order``.

    Raises:
        PlanError: The two orders do not hold the same actions, or the completion order contradicts
            the compute order.
    """
    place = {action: index for index, action in enumerate(completion_order)}
    keyed: list[list[tuple[_Key, Action]]] = [
        _compute_keys(rank, actions, place) for rank, actions in enumerate(compute_order)
    ]
    if sum(map(len, keyed)) != len(completion_order):
        raise PlanError(
            f"the completion order has {len(completion_order)} actions, the compute order "
            f"{sum(map(len, keyed))} (expected the same actions in both)"
        )
    partition = graph.partition
    for index, message in enumerate(cross_rank_messages(graph)):
        key = (_ready_place(graph, message, place), _MESSAGE, index)
        keyed[partition[message.source].rank].append((key, message.send))
        keyed[partition[message.target].rank].append((key, message.receive))
    for rank, line in enumerate(keyed):
        line.extend(_reduce_keys(graph, rank, compute_order[rank], place))
    return tuple(
        tuple(action for _, action in sorted(line, key=lambda entry: entry[0])) for line in keyed
    )


def cross_rank_messages(graph: PipelineGraph) -> Iterator[Message]:
    """Every message of the batch between two ranks, in one fixed order."""
    for work in graph.works:
        for message in graph.forward_outputs(work):
            if graph.crosses_ranks(message):
                yield message
                if graph.has_backward(message.source):
                    yield message.reverse


def _compute_keys(
    rank: int, actions: Sequence[Action], place: dict[Action, int]
) -> list[tuple[_Key, Action]]:
    keyed = []
    last = -1
    for action in actions:
        if place.get(action, -1) <= last:
            raise PlanError(
                f"rank {rank}: {action} is missing from the completion order, comes twice, or "
                f"stands there before an earlier action of its rank"
            )
        last = place[action]
        keyed.append(((last, _COMPUTE, 0), action))
    return keyed


def _ready_place(graph: PipelineGraph, message: Message, place: dict[Action, int]) -> int:
    """Place of the last action that contributes to ``message``."""
    return max(_end_place(graph, work, message, place) for work in graph.contributors(message))


def _end_place(graph: PipelineGraph, work: Work, message: Message, place: dict[Action, int]) -> int:
    kinds: tuple[ActionType, ...] = (ActionType.FORWARD,)
    if message.is_gradient:
        kinds = (ActionType.BACKWARD, ActionType.INPUT_GRAD)
    for kind in kinds:
        found = place.get(work.action(kind))
        if found is not None:
            return found
    raise PlanError(f"{message.send} has nothing to send: no rank runs {work.action(kinds[0])}")


def _reduce_keys(
    graph: PipelineGraph, rank: int, actions: Sequence[Action], place: dict[Action, int]
) -> list[tuple[_Key, Action]]:
    last_backward: dict[int, int] = {}
    for action in actions:
        if action.type in BACKWARD_TYPES:
            last_backward[action.stage] = place[action]
    keyed = []
    earliest = -1
    for index, stage in enumerate(canonical_reduce_order(graph, rank)):
        earliest = max(earliest, last_backward.get(stage, -1))
        keyed.append(((earliest, _REDUCE, index), Action(stage, ActionType.REDUCE_GRAD)))
    return keyed
