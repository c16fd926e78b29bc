"""Offloading in plans: the form, what is refused, and times and memory as the page states them.

``written_times`` and ``written_memory`` follow the text of ``docs/plan_format.md`` alone.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    cases,
    chain_case,
    encoder_case,
    items_of,
    message_bytes,
    sizes_of,
    written_cost,
)

from megatron_dip.costs.work import static_bytes
from megatron_dip.errors import PlanError, PlanMemoryError, ProblemError
from megatron_dip.plan import Action, ActionType, Message, Plan, QueueModel, Work, parse_plan
from megatron_dip.plan.actions import parse_actions
from megatron_dip.plan.plan import Offload, Recompute
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import (
    joint_problem,
    make_plan,
    pack_plan,
    plan_from_order,
    restrict_plan,
    unpack_plan,
)
from megatron_dip.simulator import simulate
from megatron_dip.simulator.timeline import plan_panel
from megatron_dip.workload import HostLink, Problem, parse_problem

_OUT, _FREE, _BACK = ActionType.OFFLOAD, ActionType.RELEASE, ActionType.RELOAD


def linked(problem: Problem, memory: int = 10**9, **fields: float) -> Problem:
    given = {"latency_us": 0.0, "bytes_per_us": 10.0} | fields
    link = HostLink(memory_bytes=(memory,) * problem.num_ranks, **given)
    return problem.model_copy(update={"host_link": link})


# ---- the page, written out -----------------------------------------------------------------------


class Written:
    """Durations by the rules of the page."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.graph = plan, plan.graph
        self.again = {Work(r.stage, r.microbatch, r.sub): len(r.layers) for r in plan.recompute}
        self.away = {Work(o.stage, o.microbatch, o.sub): len(o.layers) for o in plan.offload}

    def away_bytes(self, work: Work) -> int:
        items = items_of(self.graph, work)
        return self.away.get(work, 0) * sum(item.activation_bytes for item in items)

    def duration_us(self, action: Action) -> float:
        work = Work(action.stage, action.microbatch or 0, action.sub)
        if action.type in (_OUT, _BACK):
            link = self.plan.problem.host_link
            return link.latency_us + self.away_bytes(work) / link.bytes_per_us
        if action.type in (_FREE, ActionType.REDUCE_GRAD):
            return 0.0
        if action.type.is_send or action.type.is_receive:
            transfer = self.plan.problem.transfer
            moved = message_bytes(self.graph, Message.of(action))
            return transfer.latency_us + moved / transfer.bytes_per_us
        forward, input_grad, weight_grad, _ = written_cost(
            self.graph, work, self.again.get(work, 0)
        )
        times = {"F": forward, "B": input_grad + weight_grad, "I": input_grad, "W": weight_grad}
        return times[action.type.value]

    def reads(self, action: Action) -> tuple[Message, ...]:
        work = Work(action.stage, action.microbatch or 0, action.sub)
        if action.type is ActionType.FORWARD:
            return self.graph.forward_inputs(work)
        if action.type in (ActionType.BACKWARD, ActionType.INPUT_GRAD):
            return self.graph.backward_inputs(work)
        return ()

    def made_us(self, message: Message, ends: dict[Action, float]) -> float:
        """When the last contributor of a message ends."""
        kinds = (ActionType.BACKWARD, ActionType.INPUT_GRAD)
        kinds = kinds if message.is_gradient else (ActionType.FORWARD,)
        return max(
            ends.get(work.action(kind), 0.0)
            for work in self.graph.contributors(message)
            for kind in kinds
        )


def until_nothing_changes(
    plan: Plan, sweep: Callable[[dict[Action, float], dict[Action, float]], None]
) -> dict[Action, tuple[float, float]]:
    """Starts and ends, raised from zero by ``sweep`` until they stay."""
    starts: dict[Action, float] = {}
    ends: dict[Action, float] = {}
    for _ in range(sum(map(len, plan.actions)) + 2):
        before = dict(ends), dict(starts)
        sweep(starts, ends)
        if before == (ends, starts):
            return {action: (starts[action], ends[action]) for action in starts}
    raise AssertionError("times that rise for ever")


def written_times(plan: Plan) -> dict[Action, tuple[float, float]]:
    written = Written(plan)
    if plan.queues is not None:
        return until_nothing_changes(plan, lambda s, e: sweep_queues(written, s, e))

    def sweep(starts: dict[Action, float], ends: dict[Action, float]) -> None:
        for line in plan.actions:
            place_us, copied_us = 0.0, {_OUT: 0.0, _BACK: 0.0}
            for action in line:
                if action.type is _FREE:
                    place_us = max(place_us, ends[action._replace(type=_OUT)])
                    starts[action] = ends[action] = place_us
                elif action.type.is_copy:
                    starts[action] = max(place_us, copied_us[action.type])
                    ends[action] = starts[action] + written.duration_us(action)
                    copied_us[action.type] = ends[action]
                elif action.type.is_compute:
                    start = place_us
                    for message in written.reads(action):
                        delay = 0.0
                        if plan.graph.crosses_ranks(message):
                            delay = written.duration_us(message.send)
                        start = max(start, written.made_us(message, ends) + delay)
                    if action.type in (ActionType.BACKWARD, ActionType.INPUT_GRAD):
                        start = max(start, ends.get(action._replace(type=_BACK), 0.0))
                    starts[action] = start
                    ends[action] = place_us = start + written.duration_us(action)

    return until_nothing_changes(plan, sweep)


def sweep_queues(written: Written, starts: dict[Action, float], ends: dict[Action, float]) -> None:
    """The rules of one hardware queue, once over all lists."""
    plan = written.plan
    rank_of = {stage.stage: stage.rank for stage in plan.partition.stages}
    for line in plan.actions:
        started_us = computed_us = 0.0
        streams: dict[object, float] = {}
        sent: dict[object, count[int]] = {}
        for action in line:
            stream: object = action.type
            waits = [started_us]
            if action.type.is_send or action.type.is_receive:
                channel = (rank_of[action.stage], rank_of[action.peer or 0], action.type)
                turn = next(sent.setdefault(channel, count()))
                stream = (channel, turn % plan.queues.communicators)
            if action.type.is_compute or action.type is _FREE:
                stream = "computing"
            elif not action.type.is_receive and action.type is not ActionType.REDUCE_GRAD:
                waits.append(computed_us)
            waits.append(streams.get(stream, 0.0))
            waits += [
                ends.get(message.receive, 0.0)
                for message in written.reads(action)
                if plan.graph.crosses_ranks(message)
            ]
            if action.type in (ActionType.BACKWARD, ActionType.INPUT_GRAD):
                waits.append(ends.get(action._replace(type=_BACK), 0.0))
            if action.type is _FREE:
                waits.append(ends[action._replace(type=_OUT)])
            starts[action] = started_us = max(waits)
            later = starts[action]
            if action.type.is_send or action.type.is_receive:
                message = Message.of(action)
                other = message.receive if action.type.is_send else message.send
                later = max(later, starts.get(other, 0.0))
            ends[action] = later + written.duration_us(action)
            if action.type is not ActionType.REDUCE_GRAD:
                streams[stream] = ends[action]
            computed_us = streams.get("computing", 0.0)


def written_memory(plan: Plan) -> tuple[list[int], list[int]]:
    """The most that every rank, and its host, holds."""
    written = Written(plan)
    peaks, host_peaks = [], []
    for rank, line in enumerate(plan.actions):
        held = [static_bytes(plan.problem, plan.partition, rank)]
        on_host = [0]
        for action in line:
            if not (action.type.is_compute or action.type.is_copy):
                continue
            work = Work(action.stage, action.microbatch or 0, action.sub)
            stored = written_cost(plan.graph, work, written.again.get(work, 0))[3]
            away = written.away_bytes(work)
            is_split = work.action(ActionType.WEIGHT_GRAD) in line
            if action.type is ActionType.FORWARD:
                held.append(held[-1] + (stored if plan.graph.has_backward(work.stage) else 0))
            elif action.type is _FREE:
                held.append(held[-1] - away)
            elif action.type is _BACK:
                held.append(held[-1] + away)
            elif action.type is _OUT:
                on_host.append(on_host[-1] + away)
            elif action.type is not ActionType.WEIGHT_GRAD:
                on_host.append(on_host[-1] - away)
            if action.type is ActionType.WEIGHT_GRAD or (
                action.type in (ActionType.BACKWARD, ActionType.INPUT_GRAD) and not is_split
            ):
                held.append(held[-1] - stored)
        peaks.append(max(held))
        host_peaks.append(max(on_host))
    return peaks, host_peaks


# ---- random plans --------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of any kind whose works are offloaded and recomputed anyhow, copies standing anywhere
    between forward and backward."""
    problem, partition = draw(cases())
    fields = {
        "latency_us": draw(st.sampled_from([0.0, 0.25, 2.0])),
        "bytes_per_us": draw(st.sampled_from([0.5, 3.0, 1e9])),
    }
    queues = draw(st.sampled_from([None, QueueModel(communicators=1), QueueModel()]))
    plan = make_plan(
        linked(problem, **fields),
        partition,
        max_tokens={problem.module_order[0]: 2},
        split_backward=draw(st.booleans()),
        queues=queues,
    )
    recompute, offload, ranks = [], [], [list(line) for line in plan.actions]
    for work in plan.graph.works:
        layers = list(plan.graph.backwards[work.stage].layers)
        draw(st.randoms()).shuffle(layers)
        num_away = draw(st.integers(0, len(layers)))
        num_again = draw(st.integers(0, len(layers) - num_away))
        if num_again:
            recompute.append(Recompute(*work, tuple(layers[num_away : num_away + num_again])))
        if num_away:
            offload.append(Offload(*work, tuple(layers[:num_away])))
            line = ranks[partition[work.stage].rank]
            names = {work.action(kind) for kind in (ActionType.BACKWARD, ActionType.INPUT_GRAD)}
            first = line.index(work.action(ActionType.FORWARD)) + 1
            last = next(place for place, action in enumerate(line) if action in names)
            places = sorted(draw(st.tuples(*[st.integers(first, last)] * 3)))
            for shift, (place, kind) in enumerate(zip(places, (_OUT, _FREE, _BACK), strict=True)):
                line.insert(place + shift, work.action(kind))
    return replace(
        plan,
        actions=tuple(map(tuple, ranks)),
        recompute=tuple(recompute),
        offload=tuple(offload),
        estimate=None,
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_times_and_memory_are_what_the_page_says(plan):
    validate_plan(plan)
    simulation = simulate(plan)
    written = written_times(plan)
    for line in simulation.timelines:
        for action, start_us, end_us in line:
            assert (start_us, end_us) == pytest.approx(written[action], rel=1e-9, abs=1e-9), action
    peaks, host_peaks = written_memory(plan)
    assert list(simulation.peak_bytes) == peaks
    assert list(simulation.host_peak_bytes) == host_peaks
    # Pictures show the same.
    panel = plan_panel(plan, "plan")
    assert [max(held for _, held in panel.memory[rank]) for rank in panel.memory] == peaks
    again = parse_plan(plan.to_json())
    assert again == plan


# ---- what the rules mean -------------------------------------------------------------------------


def chain_plan(text: str, **fields: float) -> Plan:
    """Two microbatches of one layer of 10 bytes on one rank: F takes 1, B 2, a copy 1 as well."""
    problem, partition = chain_case(1, 2)
    problem = linked(problem, **fields)
    away = sorted({action.microbatch for action in parse_actions(text) if action.type.is_copy})
    return plan_from_order(
        make_plan(problem, partition).graph,
        [parse_actions(text)],
        offload=[Offload(0, number, 0, (0,)) for number in away],
    )


GOOD = "0F0 0OFFLOAD0 0F1 0RELEASE0 0B1 0RELOAD0 0B0"


def test_a_copy_goes_beside_computing_and_its_memory_is_free_behind_its_release():
    plan = chain_plan(GOOD)
    simulation = simulate(plan)
    times = {str(t.action): (t.start_us, t.end_us) for t in simulation.timelines[0]}
    assert times["0OFFLOAD0"] == (1.0, 2.0)
    assert times["0RELEASE0"] == (2.0, 2.0)
    assert times["0RELOAD0"] == (4.0, 5.0)
    assert times["0B0"] == (5.0, 7.0)
    assert simulation.peak_bytes == (20,)
    assert simulation.host_peak_bytes == (10,)
    assert simulation.busy_us == (6.0,)
    early = chain_plan("0F0 0OFFLOAD0 0RELEASE0 0F1 0B1 0RELOAD0 0B0")
    assert simulate(early).peak_bytes == (10,)
    # The rank waits from 1 to 2 for the copy, and from 5 to 6 for the copy back.
    assert simulate(early).makespan_us == 8.0


def test_copies_of_one_direction_go_one_after_the_other():
    text = "0F0 0OFFLOAD0 0F1 0OFFLOAD1 0RELEASE0 0RELEASE1 0RELOAD1 0RELOAD0 0B1 0B0"
    simulation = simulate(chain_plan(text, latency_us=2.0))
    times = {str(t.action): (t.start_us, t.end_us) for t in simulation.timelines[0]}
    assert times["0OFFLOAD0"] == (1.0, 4.0)
    assert times["0OFFLOAD1"] == (4.0, 7.0)
    assert times["0RELOAD1"] == (7.0, 10.0)
    assert times["0RELOAD0"] == (10.0, 13.0)
    assert (times["0B1"], times["0B0"]) == ((10.0, 12.0), (13.0, 15.0))


# ---- what is refused -----------------------------------------------------------------------------


REFUSED = {
    "0F0 0OFFLOAD0 0F1 0B1 0RELOAD0 0B0": "0RELEASE0 is missing from rank 0",
    "0F0 0OFFLOAD0 0F1 0RELEASE0 0B1 0B0 0RELOAD0": "0B0 comes before 0RELOAD0",
    "0OFFLOAD0 0F0 0F1 0RELEASE0 0B1 0RELOAD0 0B0": "0OFFLOAD0 comes before 0F0",
    "0F0 0OFFLOAD0 0F1 0RELOAD0 0B1 0RELEASE0 0B0": "0RELOAD0 comes before 0RELEASE0",
    "0F0 0OFFLOAD0 0F1 0RELEASE0 0B1 0RELOAD0 0B0 0OFFLOAD1": "0OFFLOAD1 copies nothing",
    "0F0 0OFFLOAD0 0OFFLOAD0 0F1 0RELEASE0 0B1 0RELOAD0 0B0": "0OFFLOAD0 comes twice",
    "0F0 0OFFLOAD0 0F1 0RELEASE0 0B1 0RELOAD7 0B0": "0RELOAD0 is missing",
}


@pytest.mark.parametrize("text", REFUSED)
def test_copies_that_are_not_a_loan_are_refused(text):
    plan = chain_plan(GOOD)
    line = [*parse_actions(text), plan.actions[0][-1]]
    with pytest.raises(PlanError, match=REFUSED[text]):
        validate_plan(replace(plan, actions=(tuple(line),)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offload": (Offload(0, 0, 0, ()),)}, "no layers"),
        ({"offload": (Offload(0, 0, 0, (1,)),)}, r"layers \[1\] \(expected each once, from 0 to 0"),
        ({"offload": (Offload(0, 0, 0, (0,)),) * 2}, "comes 2 times"),
        ({"offload": (Offload(0, 5, 0, (0,)),)}, "no such work"),
        ({"recompute": (Recompute(0, 0, 0, (0,)),)}, r"layers \[0\] are recomputed too"),
        ({"offload": ()}, "0OFFLOAD0 copies nothing"),
        ({"problem": chain_case(1, 2)[0]}, "no host_link"),
    ],
)
def test_entries_that_mean_nothing_are_refused(changed, message):
    with pytest.raises(PlanError, match=message):
        validate_plan(replace(chain_plan(GOOD), **changed))


def test_more_than_the_memory_of_the_host_is_refused():
    plan = chain_plan(GOOD)
    plan = replace(plan, problem=linked(plan.problem, memory=9))
    simulation = simulate(plan)
    with pytest.raises(PlanMemoryError, match="rank 0: the plan needs 10 bytes of the host's"):
        check_memory(plan, simulation.peak_bytes, simulation.host_peak_bytes)
    with pytest.raises(ProblemError, match=r"host_link\.memory_bytes has 2 entries for 1 ranks"):
        link = {"latency_us": 0.0, "bytes_per_us": 1.0, "memory_bytes": [1, 2]}
        parse_problem(chain_case(1, 2)[0].model_dump(mode="json") | {"host_link": link})


# ---- forms ---------------------------------------------------------------------------------------


def test_a_link_and_its_copies_travel_and_what_has_none_says_nothing():
    bare, _ = chain_case(1, 2)
    assert "host_link" not in bare.model_dump(mode="json")
    assert linked(bare).digest() != bare.digest()
    assert parse_problem(linked(bare).model_dump(mode="json")) == linked(bare)
    plan = chain_plan(GOOD)
    assert "offload" not in make_plan(*chain_case(1, 2)).to_json()
    sizes = sizes_of(plan.problem)
    packed = pack_plan(plan, [sizes])
    problem, partition = plan.problem, plan.partition
    assert unpack_plan(packed, lambda _: problem, partition, own=sizes).plan == plan


def test_a_joint_plan_hands_its_copies_to_the_batches_that_have_the_works():
    problem, partition = encoder_case()
    smaller = problem.model_copy(
        update={"microbatches": ({"language": problem.items("language", 0)},) * 2}
    )
    problems = [linked(problem, memory=50), linked(smaller, memory=40)]
    joint = joint_problem(problems)
    assert joint.host_link.memory_bytes == (40, 40)
    with pytest.raises(PlanError, match="host_link"):
        joint_problem([problem, problems[1]])
    plan = make_plan(joint, partition)
    line = list(plan.actions[0])
    works = [Work(0, 0, 0), Work(2, 1, 0)]
    for work in works:
        place = line.index(work.action(ActionType.FORWARD)) + 1
        line[place:place] = [work.action(kind) for kind in (_OUT, _FREE, _BACK)]
    plan = replace(
        plan,
        actions=(tuple(line), plan.actions[1]),
        offload=tuple(Offload(*work, (0,)) for work in works),
    )
    first, second = (restrict_plan(plan, one) for one in problems)
    assert len(first.offload) == 2
    assert [one.microbatch for one in second.offload] == [1]
