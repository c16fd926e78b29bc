"""Validation: is a plan a correct schedule of its problem?

Runs on every plan, always, whether searched, written by hand or read from a file.  It proves that
every rank has exactly its actions, that nothing is read before it is there, that both ends of every
channel agree on the order of messages, and that the plan makes progress even where a send waits for
its receive, under the hardware queues that it is made for.  What a plan costs is not checked here,
except for memory in :func:`check_memory`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PlanDeadlockError, PlanError, PlanMemoryError
from megatron_dip.plan.actions import ActionType
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.plan.lowering import canonical_reduce_order
from megatron_dip.plan.numbers import TYPE_NUMBERS, ActionNumbers, number_actions
from megatron_dip.plan.plan import Offload, Plan, Recompute
from megatron_dip.plan.progress import run_to_the_end
from megatron_dip.plan.queues import ActionLists, QueueModel, list_kernels, run_kernels
from megatron_dip.plan.wiring import BoolArray, IntArray

__all__ = ["check_memory", "validate_plan"]

_F, _B, _I, _W, _SEND_F, _RECV_F, _SEND_B, _RECV_B, _REDUCE, _OFFLOAD, _, _RELOAD = (
    TYPE_NUMBERS.values()
)
_TYPES = tuple(TYPE_NUMBERS)


class _Positions(NamedTuple):
    """Where the actions of the batch stand in the list of all actions, -1 where they do not; N
    works, M messages, S stages.  On one rank, smaller is earlier."""

    computed: IntArray
    """[4, N]: ``F B I W`` of every work."""
    moved: IntArray
    """[4, M]: both sides of every message, then of its gradient."""
    reduced: IntArray
    """[S]"""
    copied: IntArray
    """[3, N]: ``OFFLOAD``, ``RELEASE``, ``RELOAD`` of every work."""

    @property
    def backward(self) -> IntArray:
        """[N]: what makes and reads the gradients of every work, ``B`` or ``I``."""
        return np.where(self.computed[_B] >= 0, self.computed[_B], self.computed[_I])


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
    numbers = number_actions(graph, plan.actions)
    positions = _check_places(graph, numbers)
    _check_compute(graph, numbers, positions)
    _check_transfers(graph, numbers, positions)
    _check_order(graph, numbers, positions)
    _check_channels(graph, numbers, positions)
    _check_reduce(graph, numbers, positions)
    _check_layers(plan)
    _check_copies(plan, numbers, positions)
    if plan.queues is None:
        _check_progress(numbers, positions)
    else:
        _check_queues(graph, numbers, plan.queues)


def check_memory(
    plan: Plan, peak_bytes: Iterable[int], host_peak_bytes: Iterable[int] = ()
) -> None:
    """Compare what ranks need with the limits of the problem.

    Args:
        plan: Which is valid.
        peak_bytes: Per rank, e.g. of a simulation.
        host_peak_bytes: Per rank, of the memory of its host; not read where nothing is offloaded.

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
    if not plan.offload:
        return
    assert plan.problem.host_link is not None, "a valid plan offloads over a link"
    for rank, (peak, limit) in enumerate(
        zip(host_peak_bytes, plan.problem.host_link.memory_bytes, strict=True)
    ):
        if peak > limit:
            raise PlanMemoryError(
                f"rank {rank}: the plan needs {peak} bytes of the host's memory (limit {limit}: "
                f"list fewer layers under 'offload', or bring them back before others leave)"
            )


# ---- where actions stand ------------------------------------------------------------------------


def _check_places(graph: PipelineGraph, numbers: ActionNumbers) -> _Positions:
    """Every action once, on the rank of its stage."""
    wiring = graph.wiring
    num_works, num_messages = len(wiring.stage), len(wiring.source)
    # All that a plan can hold, in one line: an action of type t has the places from first[t] on.
    num_stages = len(wiring.place_stage)
    first = np.cumsum([0, *[num_works] * 4, *[num_messages] * 4, num_stages, *[num_works] * 3])
    known = np.flatnonzero(numbers.number >= 0)
    slot = first[numbers.type[known]] + numbers.number[known]
    found = np.full(first[-1], -1)
    # Of several assignments the last one stays, which is the first action.
    found[slot[::-1]] = known[::-1]
    is_repeated = np.zeros(len(numbers.type), dtype=bool)
    is_repeated[known] = found[slot] != known
    is_foreign = wiring.place_rank[numbers.place] != numbers.rank
    for index in np.flatnonzero((numbers.place < 0) | is_foreign | is_repeated)[:1].tolist():
        where = f"rank {numbers.rank[index]}: {numbers.actions[index]}"
        if numbers.place[index] < 0:
            raise PlanError(f"{where} names a stage that does not exist")
        if is_foreign[index]:
            rank = wiring.place_rank[numbers.place[index]]
            raise PlanError(f"{where} belongs to rank {rank}")
        raise PlanError(f"{where} comes twice (expected once)")
    return _Positions(
        computed=found[: first[4]].reshape(4, num_works),
        moved=found[first[4] : first[8]].reshape(4, num_messages),
        reduced=found[first[8] : first[9]],
        copied=found[first[9] :].reshape(3, num_works),
    )


def _check_compute(graph: PipelineGraph, numbers: ActionNumbers, positions: _Positions) -> None:
    """Every work computed exactly once, in whole or in halves, in the order F, I, W."""
    wiring = graph.wiring
    computed, is_there = positions.computed, positions.computed >= 0
    is_split = wiring.has_weight_grad & is_there[_I]
    is_frozen = wiring.has_backward & ~wiring.has_weight_grad
    is_expected = np.stack(
        [
            np.ones_like(is_split),
            wiring.has_weight_grad & ~is_split,
            is_split | is_frozen,
            is_split,
        ]
    )
    for work, kind in np.argwhere((is_expected & ~is_there).T)[:1].tolist():
        action = graph.works[work].action(_TYPES[kind])
        raise PlanError(f"{action} is missing from rank {wiring.rank[work]}")
    for before, after in ((_F, _B), (_F, _I), (_I, _W)):
        _check_before(
            numbers,
            is_expected[before] & is_expected[after],
            (computed[before], computed[after]),
            "{after} comes before {before} (expected after it)",
        )
    for work, kind in np.argwhere((is_there & ~wiring.has_backward).T):
        if kind != _F:
            forward = numbers.actions[computed[_F, work]]
            raise PlanError(
                f"{numbers.actions[computed[kind, work]]}: {forward} has no backward (nothing "
                f"trained in its stage or before it)"
            )
    _refuse_others(
        numbers,
        (_F, _W),
        is_expected,
        "is not part of the batch (no such work, or the wrong kind of backward)",
    )
    _refuse_others(
        numbers,
        (_REDUCE, _REDUCE),
        np.ones((1, len(wiring.place_stage)), dtype=bool),
        "stands for a whole stage (expected without a microbatch)",
    )


def _refuse_others(
    numbers: ActionNumbers, types: tuple[int, int], is_expected: BoolArray, why: str
) -> None:
    """Refuse what has one of these types (the first to the last) and is not expected.

    Args:
        numbers: All actions.
        types: The first and the last.
        is_expected: [number of types, numbers of works, messages or stages]
        why: What is wrong with the others.
    """
    first, last = types
    given = np.flatnonzero((numbers.type >= first) & (numbers.type <= last))
    number = numbers.number[given]
    fits = number >= 0
    fits[fits] = is_expected[numbers.type[given][fits] - first, number[fits]]
    for index in given[~fits][:1].tolist():
        raise PlanError(f"{numbers.actions[index]} {why}")


def _check_before(
    numbers: ActionNumbers, where: BoolArray, pairs: tuple[IntArray, IntArray], message: str
) -> None:
    """Refuse pairs of positions, where they count, of which the first is behind the second.

    ``message`` says so of ``{before}`` and ``{after}``, which should be in that order.
    """
    before, after = pairs
    for index in np.flatnonzero(where & (before > after))[:1].tolist():
        names = (numbers.actions[before[index]], numbers.actions[after[index]])
        raise PlanError(message.format(before=names[0], after=names[1]))


# ---- transfers ----------------------------------------------------------------------------------


def _check_transfers(graph: PipelineGraph, numbers: ActionNumbers, positions: _Positions) -> None:
    """Every message between ranks sent once and received once, and no other."""
    wiring = graph.wiring
    returns = wiring.crosses & wiring.has_gradient
    is_expected = np.stack([wiring.crosses, wiring.crosses, returns, returns])
    for number, side in np.argwhere((is_expected & (positions.moved < 0)).T)[:1].tolist():
        source = graph.works[wiring.source[number]]
        target = int(wiring.place_stage[wiring.target[number]])
        message = next(m for m in graph.forward_outputs(source) if m.target == target)
        message = message if side < 2 else message.reverse
        action = message.receive if side % 2 else message.send
        raise PlanError(f"{action} is missing from rank {graph.partition[action.stage].rank}")
    _refuse_others(
        numbers,
        (_SEND_F, _RECV_B),
        is_expected,
        "moves nothing that the batch needs between two ranks",
    )


def _check_order(graph: PipelineGraph, numbers: ActionNumbers, positions: _Positions) -> None:
    """Nothing is sent before it is made, nor read before it is there.

    Inside a rank, only the order of its list makes a reader wait.
    """
    wiring = graph.wiring
    message = np.repeat(np.arange(len(wiring.source)), np.diff(wiring.first_reader))
    source, reader = wiring.reader_source, wiring.reader
    crosses, returns = wiring.crosses[message], wiring.has_gradient[message]
    forward, backward = positions.computed[_F], positions.backward
    send, receive, send_back, receive_back = positions.moved[:, message]
    early = "{after} comes before {before}, which it needs"
    late = "{before} comes after {after}, which reads it"
    for where, before, after, text in (
        (crosses, forward[source], send, early),
        (crosses, receive, forward[reader], late),
        (crosses & returns, backward[reader], send_back, early),
        (crosses & returns, receive_back, backward[source], late),
        (~crosses, forward[source], forward[reader], early),
        (~crosses & returns, backward[reader], backward[source], early),
    ):
        _check_before(numbers, where, (before, after), text)


def _check_channels(graph: PipelineGraph, numbers: ActionNumbers, positions: _Positions) -> None:
    """Per (sender rank, receiver rank, direction): both sides post in the same order."""
    wiring = graph.wiring
    num_ranks, num_actions = graph.problem.num_ranks, len(numbers.actions)
    for is_there, (sends, receives) in (
        (wiring.crosses, positions.moved[:2]),
        (wiring.crosses & wiring.has_gradient, positions.moved[2:]),
    ):
        send, receive = sends[is_there], receives[is_there]
        channel = numbers.rank[send] * num_ranks + numbers.rank[receive]
        sent = np.argsort(channel * num_actions + send)
        received = np.argsort(channel * num_actions + receive)
        for index in np.flatnonzero(sent != received)[:1].tolist():
            number = index - int(np.searchsorted(channel[sent], channel[sent[index]]))
            ours, theirs = send[sent[index]], receive[received[index]]
            source, target = numbers.rank[ours], numbers.rank[theirs]
            raise PlanError(
                f"message {number} from rank {source} to rank {target}: rank {source} posts "
                f"{numbers.actions[ours]}, rank {target} posts {numbers.actions[theirs]} (expected "
                f"the same message on both sides)"
            )


# ---- the rest -----------------------------------------------------------------------------------


def _check_reduce(graph: PipelineGraph, numbers: ActionNumbers, positions: _Positions) -> None:
    """REDUCE_GRAD once per trainable stage, after its last backward, in the canonical order."""
    wiring = graph.wiring
    last_backward = np.full(len(wiring.place_stage), -1)
    np.maximum.at(last_backward, wiring.place, positions.computed[_B:].max(axis=0))
    reduced = positions.reduced
    for place in np.flatnonzero((reduced >= 0) & (last_backward > reduced))[:1].tolist():
        raise PlanError(
            f"rank {wiring.place_rank[place]}: {numbers.actions[last_backward[place]]} comes after "
            f"{numbers.actions[reduced[place]]} (expected before it)"
        )
    in_order = np.argsort(reduced)
    for rank in range(graph.problem.num_ranks):
        is_here = (reduced[in_order] >= 0) & (wiring.place_rank[in_order] == rank)
        stages = wiring.place_stage[in_order[is_here]].tolist()
        expected = list(canonical_reduce_order(graph, rank))
        if stages != expected:
            raise PlanError(
                f"rank {rank}: REDUCE_GRAD of stages {stages} (expected {expected}, in this order: "
                f"it must be the same on all data-parallel replicas)"
            )


def _check_layers(plan: Plan) -> None:
    """Recomputed and offloaded layers exist, once, and no layer is both."""
    for name, entries in (("recompute", plan.recompute), ("offload", plan.offload)):
        _check_entries(plan, name, entries)
    for entry in plan.offload:
        work = Work(entry.stage, entry.microbatch, entry.sub)
        what = f"offload of {work.action(ActionType.FORWARD)}"
        if plan.problem.host_link is None:
            raise PlanError(f"{what}: the problem has no host_link (expected one to offload over)")
        if not entry.layers:
            raise PlanError(f"{what}: no layers (expected some, or no entry)")
        both = sorted(set(entry.layers).intersection(plan.recomputed_layers.get(work, ())))
        if both:
            raise PlanError(
                f"{what}: layers {both} are recomputed too (expected each under 'recompute' or "
                f"under 'offload')"
            )


def _check_entries(plan: Plan, name: str, entries: Sequence[Recompute | Offload]) -> None:
    repeated = Counter(Work(r.stage, r.microbatch, r.sub) for r in entries)
    for entry in entries:
        work = Work(entry.stage, entry.microbatch, entry.sub)
        what = f"{name} of {work.action(ActionType.FORWARD)}"
        if work not in plan.graph.numbers:
            raise PlanError(f"{what}: no such work in the batch")
        if repeated[work] > 1:
            raise PlanError(f"{what} comes {repeated[work]} times (expected once)")
        if not plan.graph.has_backward(work.stage):
            raise PlanError(f"{what}: it has no backward, so nothing is stored to begin with")
        known = plan.graph.backwards[work.stage].layers
        outside = sorted(set(entry.layers).difference(known))
        if outside or len(set(entry.layers)) != len(entry.layers):
            raise PlanError(
                f"{what}: layers {list(entry.layers)} (expected each once, from {known.start} to "
                f"{known.stop - 1}: layers of the stage that have a backward)"
            )


def _check_copies(plan: Plan, numbers: ActionNumbers, positions: _Positions) -> None:
    """``OFFLOAD``, ``RELEASE`` and ``RELOAD`` of every offloaded work, in this order, between its
    forward and its backward."""
    graph = plan.graph
    is_away = np.zeros(len(graph.wiring.stage), dtype=bool)
    is_away[[graph.numbers[work] for work in plan.offloaded_layers]] = True
    missing = is_away & (positions.copied < 0)
    for work, kind in np.argwhere(missing.T)[:1].tolist():
        action = graph.works[work].action(_TYPES[_OFFLOAD + kind])
        raise PlanError(
            f"{action} is missing from rank {graph.wiring.rank[work]} (its layers are under "
            f"'offload')"
        )
    _refuse_others(
        numbers,
        (_OFFLOAD, _RELOAD),
        np.stack([is_away] * 3),
        "copies nothing (expected copies of works that are under 'offload')",
    )
    line = (positions.computed[_F], *positions.copied, positions.backward)
    for before, after in pairwise(line):
        _check_before(
            numbers, is_away, (before, after), "{after} comes before {before} (expected after it)"
        )


def _check_progress(numbers: ActionNumbers, positions: _Positions) -> None:
    """Prove that the lists run to their end where every transfer waits for its other side.

    Every rank executes strictly in order; a send and its receive happen together, when both are at
    the head of their lists.  Real transfers wait for less, so a plan that passes cannot hang.
    """
    other_side = np.full(len(numbers.actions), -1)
    for send, receive in (positions.moved[:2], positions.moved[2:]):
        moves = send >= 0
        other_side[send[moves]] = receive[moves]
        other_side[receive[moves]] = send[moves]
    heads = numbers.first[:-1].copy()
    run_to_the_end(numbers.first, numbers.rank, other_side, heads)
    blocked = [
        f"rank {rank}: {numbers.actions[head]}"
        for rank, head in enumerate(heads.tolist())
        if head < numbers.first[rank + 1]
    ]
    if blocked:
        raise PlanDeadlockError(
            f"these actions can never run: {', '.join(blocked)} (each waits for the other side of "
            f"a transfer that stands behind another one of them)"
        )


def _check_queues(graph: PipelineGraph, numbers: ActionNumbers, queues: QueueModel) -> None:
    """Prove that the lists run to their end with the hardware queues that they are made for."""
    lists = ActionLists(numbers.first, numbers.rank, numbers.type, numbers.number)
    kernels = list_kernels(graph.wiring, lists, queues.communicators)
    # Whatever actions take: what waits in a circle waits for ever.
    times = run_kernels(kernels, np.zeros(len(numbers.actions)))
    blocked = np.flatnonzero(~times.has_started)
    _, heads = np.unique(numbers.rank[blocked], return_index=True)
    if len(heads):
        names = [f"rank {numbers.rank[b]}: {numbers.actions[b]}" for b in blocked[heads].tolist()]
        raise PlanDeadlockError(
            f"with one hardware queue these actions can never start: {', '.join(names)} (each "
            f"holds up all that stands behind it on its rank: a receive must stand behind what "
            f"ends after the one before it on its communicator)"
        )
