"""The compiled inner loop of the planners: event-driven list scheduling.

Works, tasks and their numbers are those of :mod:`megatron_dip.simulator.arrays`.  An *opener* is a
task that takes memory when it starts, a *closer* one that gives it back when it ends; with time
running forwards these are forwards and backwards.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph

__all__ = ["ALTERNATE", "BY_KEY", "CLOSERS_FIRST", "Rules", "State", "list_schedule", "new_state"]

ALTERNATE, CLOSERS_FIRST, BY_KEY = range(3)
"""Which queue goes first where both have something: not the last one's, closers, the better key."""


class Rules(NamedTuple):
    """What a schedule prefers and what it admits; N works, M microbatches, S stages."""

    key: FloatArray
    """[3 N]: smaller goes first, of equals what was ready first."""
    turn: int
    """ALTERNATE, CLOSERS_FIRST or BY_KEY."""
    opening_kind: int
    """FORWARD_KIND, or BACKWARD_KIND where time runs backwards."""
    stage: IntArray
    """[N], counted from 0."""
    first_source: IntArray
    """[S + 1]: the sources of stage s are source[first_source[s]] to source[first_source[s + 1]],
    offered one at a time."""
    source: IntArray
    stored_bytes: IntArray
    """[N]"""
    place: IntArray
    """[N]: place of a work's microbatch in the order in which memory is set aside."""
    slack_bytes: IntArray
    """[num_ranks, M]: the memory guard's start, see MemoryGuard."""
    is_guarded: NDArray[np.bool_]
    """[num_ranks]: False where everything fits at once."""
    microbatch: IntArray
    """[N]"""
    in_flight_limit: IntArray
    """[S]: microbatches that a stage may hold at once, taken in order; -1 for any number."""
    num_left: IntArray
    """[S, M]: works of every stage and microbatch."""


class State(NamedTuple):
    """What changes while a schedule is made; T tasks on a rank at most."""

    num_waiting: IntArray
    ready_us: FloatArray
    queue: IntArray
    """[3 num_ranks, T]: openers, closers, weight gradients; the best is last."""
    queue_length: IntArray
    event_us: FloatArray
    event: IntArray
    """Two per task, by time: a task that is ready, or -1 - rank for a rank that gets free."""
    next_event: IntArray
    """[1]: place of the first that has not happened."""
    events_end: IntArray
    """[1]: behind the last one."""
    running: IntArray
    """[num_ranks]: the task, or -1."""
    touched: IntArray
    """[num_ranks]: those to which something has happened now, each once."""
    is_touched: NDArray[np.bool_]
    """[num_ranks]: whether it is among them; False between calls."""
    closer_next: NDArray[np.bool_]
    next_source: IntArray
    slack_bytes: IntArray
    num_open: IntArray
    is_open: NDArray[np.bool_]
    num_left: IntArray
    next_microbatch: IntArray
    order: IntArray
    """[num_ranks, T]"""
    order_length: IntArray
    starts_us: FloatArray


@compiled
def list_schedule(graph: TaskGraph, rules: Rules, state: State) -> float:
    """Give every idle rank its best task that is ready and admitted, until nothing is left.

    The order and the starts are left in ``state``; tasks are missing where the rules admit nothing
    more.

    Returns:
        The makespan.
    """
    _reset(graph, rules, state)
    for stage in range(len(rules.first_source) - 1):
        _offer_source(graph, rules, state, stage)
    num_touched = len(state.running)
    for rank in range(num_touched):
        state.touched[rank] = rank
    now_us = 0.0
    while True:
        for place in range(num_touched):
            rank = state.touched[place]
            state.is_touched[rank] = False
            if state.running[rank] < 0:
                _start_next(graph, rules, state, rank, now_us)
        if state.next_event[0] == state.events_end[0]:
            return now_us
        now_us = state.event_us[state.next_event[0]]
        num_touched = 0
        while (
            state.next_event[0] < state.events_end[0]
            and state.event_us[state.next_event[0]] == now_us
        ):
            event = state.event[state.next_event[0]]
            state.next_event[0] += 1
            if event < 0:
                rank = -1 - event
                _end_task(graph, rules, state, rank)
            else:
                rank = graph.rank[_number_of(graph, event)]
                _enqueue(graph, rules, state, event)
            if not state.is_touched[rank]:
                state.is_touched[rank] = True
                state.touched[num_touched] = rank
                num_touched += 1


def new_state(graph: TaskGraph, num_ranks: int, num_left: IntArray) -> State:
    """Room for schedules of one batch, one after the other.

    Args:
        graph: The batch.
        num_ranks: Also of ranks that have nothing to do.
        num_left: [S, M] see :class:`Rules`.
    """
    num_tasks = len(graph.exists)
    task_rank = np.tile(graph.rank, 3)[graph.exists]
    longest = max(1, int(np.bincount(task_rank, minlength=num_ranks).max()))
    num_stages, num_microbatches = num_left.shape
    return State(
        num_waiting=np.empty(num_tasks, np.int64),
        ready_us=np.empty(num_tasks),
        queue=np.empty((3 * num_ranks, longest), np.int64),
        queue_length=np.empty(3 * num_ranks, np.int64),
        event_us=np.empty(2 * len(task_rank)),
        event=np.empty(2 * len(task_rank), np.int64),
        next_event=np.empty(1, np.int64),
        events_end=np.empty(1, np.int64),
        running=np.empty(num_ranks, np.int64),
        touched=np.empty(num_ranks, np.int64),
        is_touched=np.zeros(num_ranks, np.bool_),
        closer_next=np.empty(num_ranks, np.bool_),
        next_source=np.empty(num_stages, np.int64),
        slack_bytes=np.empty((num_ranks, num_microbatches), np.int64),
        num_open=np.empty(num_stages, np.int64),
        is_open=np.empty((num_stages, num_microbatches), np.bool_),
        num_left=np.empty((num_stages, num_microbatches), np.int64),
        next_microbatch=np.empty(num_stages, np.int64),
        order=np.empty((num_ranks, longest), np.int64),
        order_length=np.empty(num_ranks, np.int64),
        starts_us=np.empty(num_tasks),
    )


@inlined
def _reset(graph: TaskGraph, rules: Rules, state: State) -> None:
    """Nothing has started."""
    state.next_event[0] = state.events_end[0] = 0
    for task in range(len(state.starts_us)):
        state.num_waiting[task] = graph.num_inputs[task]
        state.ready_us[task] = 0.0
        state.starts_us[task] = 0.0
    state.queue_length[:] = 0
    state.order_length[:] = 0
    state.running[:] = -1
    state.closer_next[:] = False
    num_stages, num_microbatches = state.num_left.shape
    for rank in range(len(state.running)):
        for place in range(num_microbatches):
            state.slack_bytes[rank, place] = rules.slack_bytes[rank, place]
    for stage in range(num_stages):
        state.next_source[stage] = rules.first_source[stage]
        state.num_open[stage] = 0
        state.next_microbatch[stage] = 0
        for microbatch in range(num_microbatches):
            state.is_open[stage, microbatch] = False
            state.num_left[stage, microbatch] = rules.num_left[stage, microbatch]


@inlined
def _number_of(graph: TaskGraph, task: int) -> int:
    """The work of ``task``; by comparison, which takes a small part of a division's time."""
    num_works = len(graph.rank)
    if task >= 2 * num_works:
        return task - 2 * num_works
    return task - num_works if task >= num_works else task


@inlined
def _kind_of(graph: TaskGraph, task: int) -> int:
    num_works = len(graph.rank)
    if task >= 2 * num_works:
        return 2
    return 1 if task >= num_works else 0


@inlined
def _offer_source(graph: TaskGraph, rules: Rules, state: State, stage: int) -> None:
    place = state.next_source[stage]
    if place < rules.first_source[stage + 1]:
        state.next_source[stage] = place + 1
        _enqueue(graph, rules, state, rules.source[place])


@inlined
def _enqueue(graph: TaskGraph, rules: Rules, state: State, task: int) -> None:
    kind = _kind_of(graph, task)
    line = 3 * graph.rank[_number_of(graph, task)]
    if kind == 2:
        line += 2
    elif kind != rules.opening_kind:
        line += 1
    place = state.queue_length[line]
    state.queue_length[line] += 1
    key = rules.key[task]
    # Weight gradients wait in the order in which they came, so that memory held longest goes first.
    while place > 0 and (kind == 2 or rules.key[state.queue[line, place - 1]] <= key):
        state.queue[line, place] = state.queue[line, place - 1]
        place -= 1
    state.queue[line, place] = task


@inlined
def _start_next(graph: TaskGraph, rules: Rules, state: State, rank: int, now_us: float) -> None:
    openers, closers, fillers = 3 * rank, 3 * rank + 1, 3 * rank + 2
    num_openers, num_closers = state.queue_length[openers], state.queue_length[closers]
    if num_closers > 0:
        best = state.queue[closers, num_closers - 1]
        first = num_openers == 0
        if not first:
            if rules.turn == BY_KEY:
                first = rules.key[best] < rules.key[state.queue[openers, num_openers - 1]]
            else:
                first = rules.turn == CLOSERS_FIRST or state.closer_next[rank]
        if first:
            _start_last(graph, rules, state, closers, now_us)
            return
    for place in range(num_openers - 1, -1, -1):
        task = state.queue[openers, place]
        if _is_admitted(graph, rules, state, task):
            for later in range(place, num_openers - 1):
                state.queue[openers, later] = state.queue[openers, later + 1]
            state.queue[openers, num_openers - 1] = task
            _open(graph, rules, state, task)
            _start_last(graph, rules, state, openers, now_us)
            return
    if num_closers > 0:
        _start_last(graph, rules, state, closers, now_us)
    elif state.queue_length[fillers] > 0:
        _start_last(graph, rules, state, fillers, now_us)


@inlined
def _is_admitted(graph: TaskGraph, rules: Rules, state: State, task: int) -> bool:
    number = _number_of(graph, task)
    stage, rank = rules.stage[number], graph.rank[number]
    limit = rules.in_flight_limit[stage]
    if limit >= 0 and not state.is_open[stage, rules.microbatch[number]]:
        if state.num_open[stage] >= limit:
            return False
        if _next_microbatch(rules, state, stage) != rules.microbatch[number]:
            return False
    size = rules.stored_bytes[number]
    if size > 0 and rules.is_guarded[rank]:
        for place in range(rules.place[number]):
            if state.slack_bytes[rank, place] < size:
                return False
    return True


@inlined
def _next_microbatch(rules: Rules, state: State, stage: int) -> int:
    """The first microbatch of a stage that it has not taken yet."""
    microbatch = state.next_microbatch[stage]
    while state.is_open[stage, microbatch] or rules.num_left[stage, microbatch] == 0:
        microbatch += 1
    state.next_microbatch[stage] = microbatch
    return microbatch


@inlined
def _open(graph: TaskGraph, rules: Rules, state: State, task: int) -> None:
    """Count what a task takes: its own microbatch had counted it, earlier ones had not."""
    number = _number_of(graph, task)
    stage, rank, microbatch = rules.stage[number], graph.rank[number], rules.microbatch[number]
    if rules.in_flight_limit[stage] >= 0 and not state.is_open[stage, microbatch]:
        # It stays open in this table; what is in flight is counted apart.
        state.is_open[stage, microbatch] = True
        state.num_open[stage] += 1
    if rules.is_guarded[rank]:
        for place in range(rules.place[number]):
            state.slack_bytes[rank, place] -= rules.stored_bytes[number]


@inlined
def _start_last(graph: TaskGraph, rules: Rules, state: State, line: int, now_us: float) -> None:
    """Start the best task of a queue."""
    num_works = len(graph.rank)
    state.queue_length[line] -= 1
    task = state.queue[line, state.queue_length[line]]
    rank = line // 3
    if line % 3 < 2:
        state.closer_next[rank] = line % 3 == 0
    state.order[rank, state.order_length[rank]] = task
    state.order_length[rank] += 1
    state.starts_us[task] = now_us
    state.running[rank] = task
    end_us = now_us + graph.duration_us[task]
    _push_event(state, end_us, -1 - rank)
    for edge in range(graph.first_output[task], graph.first_output[task + 1]):
        other = graph.output[edge]
        state.ready_us[other] = max(state.ready_us[other], end_us + graph.delay_us[edge])
        state.num_waiting[other] -= 1
        if state.num_waiting[other] == 0 and other < 2 * num_works:
            _push_event(state, state.ready_us[other], other)
    stage = rules.stage[_number_of(graph, task)]
    place = state.next_source[stage] - 1
    if place >= rules.first_source[stage] and rules.source[place] == task:
        _offer_source(graph, rules, state, stage)


@inlined
def _end_task(graph: TaskGraph, rules: Rules, state: State, rank: int) -> None:
    num_works = len(graph.rank)
    task = state.running[rank]
    state.running[rank] = -1
    number = _number_of(graph, task)
    if task < 2 * num_works and graph.exists[2 * num_works + number]:
        if task >= num_works:
            _enqueue(graph, rules, state, 2 * num_works + number)
        return
    if _kind_of(graph, task) == rules.opening_kind:
        return
    stage, microbatch = rules.stage[number], rules.microbatch[number]
    if rules.in_flight_limit[stage] >= 0:
        state.num_left[stage, microbatch] -= 1
        if state.num_left[stage, microbatch] == 0:
            state.num_open[stage] -= 1
    if rules.is_guarded[rank]:
        for place in range(rules.place[number] + 1):
            state.slack_bytes[rank, place] += rules.stored_bytes[number]


@inlined
def _push_event(state: State, time_us: float, event: int) -> None:
    """Behind all that are not later: most events are later than most others, and few wait."""
    place = state.events_end[0]
    state.events_end[0] += 1
    while place > state.next_event[0] and state.event_us[place - 1] > time_us:
        state.event_us[place] = state.event_us[place - 1]
        state.event[place] = state.event[place - 1]
        place -= 1
    state.event_us[place] = time_us
    state.event[place] = event
