"""Validation: is a plan a correct schedule of its problem?

Runs on every plan, always, whether searched, written by hand or read from a file.  It proves that
every rank has exactly its actions, that nothing is read before it is there, that both ends of every
channel agree on the order of messages, and that the plan makes progress even where a send waits for
its receive.  What a plan costs is not checked here, except for memory in :func:`check_memory`.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

from megatron_dip.errors import PlanDeadlockError, PlanError, PlanMemoryError
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.graph import Message, PipelineGraph, Work
from megatron_dip.plan.lowering import (
    BACKWARD_TYPES,
    canonical_reduce_order,
    cross_rank_messages,
)
from megatron_dip.plan.plan import Plan

__all__ = ["check_memory", "check_progress", "validate_plan"]

Positions = dict[Action, int]
"""Where an action stands in its rank's list."""


def validate_plan(plan: Plan) -> None:
    """Check everything about ``plan`` but its estimate and its memory.

    Raises:
        PartitionError: The partition does not cover the problem.
        PlanError: An action is missing, unknown, repeated, on the wrong rank or in the wrong place;
            the message names it.
        PlanDeadlockError: Some actions can never run; the message lists the blocked heads.
    """
    graph = plan.graph
    if len(plan.actions) != graph.problem.num_ranks:
        raise PlanError(
            f"the plan has {len(plan.actions)} ranks (expected {graph.problem.num_ranks})"
        )
    positions = _check_places(plan)
    _check_compute(graph, positions)
    _check_transfers(graph, positions)
    _check_local_messages(graph, positions)
    _check_channels(plan)
    for rank, actions in enumerate(plan.actions):
        _check_reduce(graph, rank, actions)
    _check_recompute(plan)
    check_progress(plan.actions)


def check_memory(plan: Plan, peak_bytes: Iterable[int]) -> None:
    """Compare ``peak_bytes`` per rank, e.g. of a simulation, with the limits of the problem.

    Raises:
        PlanMemoryError: A rank needs more than its limit; the message names the first.
    """
    limits = plan.problem.memory_limit_bytes
    for rank, (peak, limit) in enumerate(zip(peak_bytes, limits, strict=True)):
        if peak > limit:
            raise PlanMemoryError(
                f"rank {rank}: the plan needs {peak} bytes (limit {limit}: plan with "
                f"algorithm 'dual_queue', which keeps a limit that can be kept, use smaller "
                f"microbatches or more ranks, or list layers under 'recompute')"
            )


# ---- where actions stand ------------------------------------------------------------------------


def _check_places(plan: Plan) -> Positions:
    """Every action once, on the rank of its stage."""
    stages = plan.partition.by_number
    positions: Positions = {}
    for rank, actions in enumerate(plan.actions):
        for position, action in enumerate(actions):
            stage = stages.get(action.stage)
            if stage is None:
                raise PlanError(f"rank {rank}: {action} names a stage that does not exist")
            if stage.rank != rank:
                raise PlanError(f"rank {rank}: {action} belongs to rank {stage.rank}")
            if action in positions:
                raise PlanError(f"rank {rank}: {action} comes twice (expected once)")
            positions[action] = position
    return positions


def _check_compute(graph: PipelineGraph, positions: Positions) -> None:
    """Every work computed exactly once, in whole or in halves, in the order F, I, W."""
    num_expected = 0
    for work in graph.works:
        forward = work.action(ActionType.FORWARD)
        split = work.action(ActionType.INPUT_GRAD) in positions
        chain = graph.compute_actions(work, split_backward=split)
        for action in chain:
            if action not in positions:
                raise PlanError(f"{action} is missing from rank {graph.partition[work.stage].rank}")
        num_expected += len(chain)
        for before, after in itertools.pairwise(chain):
            if positions[before] > positions[after]:
                raise PlanError(f"{after} comes before {before} (expected after it)")
        if not graph.has_backward(work.stage):
            _refuse(positions, work, BACKWARD_TYPES, f"{forward} has no backward")
    computed = [action for action in positions if action.type.is_compute]
    if len(computed) == num_expected:
        return
    expected = {
        action
        for work in graph.works
        for action in graph.compute_actions(
            work, split_backward=work.action(ActionType.INPUT_GRAD) in positions
        )
    }
    odd = next(action for action in computed if action not in expected)
    raise PlanError(f"{odd} is not part of the batch (no such work, or the wrong kind of backward)")


def _refuse(positions: Positions, work: Work, kinds: Iterable[ActionType], why: str) -> None:
    for kind in kinds:
        if work.action(kind) in positions:
            raise PlanError(
                f"{work.action(kind)}: {why} (nothing trainable in its module or upstream of it)"
            )


# ---- transfers ----------------------------------------------------------------------------------


def _check_transfers(graph: PipelineGraph, positions: Positions) -> None:
    """Every message between ranks sent once and received once, after its makers, before readers."""
    num_messages = 0
    for message in cross_rank_messages(graph):
        num_messages += 1
        send, receive = message.send, message.receive
        for action in (send, receive):
            if action not in positions:
                rank = graph.partition[action.stage].rank
                raise PlanError(f"{action} is missing from rank {rank}")
        _check_made_before(graph, positions, message, positions[send], str(send))
        for reader in _readers(graph, positions, message):
            if positions[receive] > positions[reader]:
                raise PlanError(f"{receive} comes after {reader}, which reads it")
    transfers = [a for a in positions if a.type.is_send or a.type.is_receive]
    if len(transfers) != 2 * num_messages:
        messages = set(cross_rank_messages(graph))
        odd = next(action for action in transfers if Message.of(action) not in messages)
        raise PlanError(f"{odd} moves nothing that the batch needs between two ranks")


def _check_local_messages(graph: PipelineGraph, positions: Positions) -> None:
    """Inside a rank, only the order of its list makes a reader wait."""
    for work in graph.works:
        for forward in graph.forward_outputs(work):
            if graph.crosses_ranks(forward):
                continue
            messages = [forward]
            if graph.has_backward(forward.source):
                messages.append(forward.reverse)
            for message in messages:
                for reader in _readers(graph, positions, message):
                    _check_made_before(graph, positions, message, positions[reader], str(reader))


def _check_made_before(
    graph: PipelineGraph, positions: Positions, message: Message, position: int, what: str
) -> None:
    for work in graph.contributors(message):
        maker = _maker(positions, work, message.is_gradient)
        if positions[maker] > position:
            raise PlanError(f"{what} comes before {maker}, which it needs")


def _readers(graph: PipelineGraph, positions: Positions, message: Message) -> list[Action]:
    return [_maker(positions, work, message.is_gradient) for work in graph.readers(message)]


def _maker(positions: Positions, work: Work, is_gradient: bool) -> Action:
    """The action of ``work`` that makes and reads messages of one direction."""
    if not is_gradient:
        return work.action(ActionType.FORWARD)
    backward = work.action(ActionType.BACKWARD)
    return backward if backward in positions else work.action(ActionType.INPUT_GRAD)


def _check_channels(plan: Plan) -> None:
    """Per (sender rank, receiver rank, direction): both sides post in the same order."""
    rank_of = {number: stage.rank for number, stage in plan.partition.by_number.items()}
    sent: dict[tuple[int, int, bool], list[Message]] = {}
    received: dict[tuple[int, int, bool], list[Message]] = {}
    for actions in plan.actions:
        for action in actions:
            if action.type.is_send or action.type.is_receive:
                message = Message.of(action)
                channel = (rank_of[message.source], rank_of[message.target], message.is_gradient)
                side = sent if action.type.is_send else received
                side.setdefault(channel, []).append(message)
    for channel, messages in sent.items():
        for index, (message, other) in enumerate(
            zip(messages, received.get(channel, []), strict=True)
        ):
            if message != other:
                source, target, _ = channel
                raise PlanError(
                    f"message {index} from rank {source} to rank {target}: rank {source} posts "
                    f"{message.send}, rank {target} posts {other.receive} (expected the same "
                    f"message on both sides)"
                )


# ---- the rest -----------------------------------------------------------------------------------


def _check_reduce(graph: PipelineGraph, rank: int, actions: Iterable[Action]) -> None:
    """REDUCE_GRAD once per trainable stage, after its last backward, in the canonical order."""
    reduced: list[int] = []
    for action in actions:
        if action.type is ActionType.REDUCE_GRAD:
            reduced.append(action.stage)
        elif action.type in BACKWARD_TYPES and action.stage in reduced:
            raise PlanError(
                f"rank {rank}: {action} comes after {action.stage}REDUCE_GRAD (expected before it)"
            )
    expected = list(canonical_reduce_order(graph, rank))
    if reduced != expected:
        raise PlanError(
            f"rank {rank}: REDUCE_GRAD of stages {reduced} (expected {expected}, in this order: it "
            f"must be the same on all data-parallel replicas)"
        )


def _check_recompute(plan: Plan) -> None:
    works = set(plan.graph.works)
    repeated = Counter(Work(r.stage, r.microbatch, r.sub) for r in plan.recompute)
    for entry in plan.recompute:
        work = Work(entry.stage, entry.microbatch, entry.sub)
        what = f"recompute of {work.action(ActionType.FORWARD)}"
        if work not in works:
            raise PlanError(f"{what}: no such work in the batch")
        if repeated[work] > 1:
            raise PlanError(f"{what} comes {repeated[work]} times (expected once)")
        if not plan.graph.has_backward(work.stage):
            raise PlanError(f"{what}: it has no backward, so nothing is stored to begin with")
        stage = plan.partition[work.stage]
        outside = sorted(set(entry.layers).difference(stage.layers))
        if outside or len(set(entry.layers)) != len(entry.layers):
            raise PlanError(
                f"{what}: layers {list(entry.layers)} (expected each once, from "
                f"{stage.first_layer} to {stage.first_layer + stage.num_layers - 1})"
            )


def check_progress(ranks: tuple[tuple[Action, ...], ...]) -> None:
    """Prove that the lists run to their end where every transfer waits for its other side.

    Every rank executes strictly in order; a send and its receive happen together, when both are at
    the head of their lists.  Real transfers wait for less, so a plan that passes cannot hang.

    Raises:
        PlanDeadlockError: Some actions can never run; the message lists the blocked heads.
    """
    heads = [0] * len(ranks)
    # A transfer at the head of its list waits here for its other side.
    waiting: dict[Message, int] = {}
    runnable = list(range(len(ranks)))
    while runnable:
        rank = runnable.pop()
        actions = ranks[rank]
        while heads[rank] < len(actions):
            action = actions[heads[rank]]
            if action.type.is_send or action.type.is_receive:
                message = Message.of(action)
                other = waiting.pop(message, None)
                if other is None:
                    waiting[message] = rank
                    break
                heads[other] += 1
                runnable.append(other)
            heads[rank] += 1
    blocked = [
        f"rank {rank}: {actions[head]}"
        for rank, (actions, head) in enumerate(zip(ranks, heads, strict=True))
        if head < len(actions)
    ]
    if blocked:
        raise PlanDeadlockError(
            f"these actions can never run: {', '.join(blocked)} (each waits for the other side of "
            f"a transfer that stands behind another one of them)"
        )
