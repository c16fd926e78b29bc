"""Plans for one hardware queue: the model, what it refuses, where receives go, what that takes."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, chain_case, encoder_case

from megatron_dip.errors import PlanDeadlockError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import (
    Action,
    ActionType,
    Message,
    Plan,
    QueueModel,
    Work,
    one_queue_model,
    parse_actions,
    parse_plan,
)
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import make_plan, plan_from_order
from megatron_dip.planner.joint import joint_problem, restrict_plan
from megatron_dip.simulator import simulate
from megatron_dip.simulator.tasks import build_task_table

ONE = QueueModel(communicators=1)
HANG_S, PATIENCE_S = 0.5, 60.0


def with_ranks(plan: Plan, ranks: Sequence[Sequence[Action]], queues: QueueModel = ONE) -> Plan:
    return replace(plan, actions=tuple(map(tuple, ranks)), queues=queues)


def posted_first(plan: Plan) -> Plan:
    """All receives of a rank before everything else, in their order."""
    ranks = [sorted(line, key=lambda action: not action.type.is_receive) for line in plan.actions]
    return with_ranks(plan, ranks)


# ---- the rules once more, action by action -------------------------------------------------------


class Rules:
    """What the documented rules say of a plan, for an oracle and for threads that act it out."""

    def __init__(self, plan: Plan) -> None:
        assert plan.queues is not None
        self.plan = plan
        table = build_task_table(plan.graph, plan.recomputed_layers)
        self._times = {
            ActionType.FORWARD: table.forward_us,
            ActionType.BACKWARD: table.backward_us,
            ActionType.INPUT_GRAD: table.input_grad_us,
            ActionType.WEIGHT_GRAD: table.weight_grad_us,
        }
        self._transfer_us = table.transfer_us
        self.after_end: dict[Action, list[Action]] = {}
        """What has to end before an action starts."""
        self.after_start: dict[Action, list[Action]] = {}
        for line in plan.actions:
            self._add_line(line, plan.queues.communicators)

    def _add_line(self, line: Sequence[Action], num_communicators: int) -> None:
        graph, computing, posted = self.plan.graph, [], {}
        for place, action in enumerate(line):
            waits: list[Action] = []
            if action.type.is_compute:
                waits += computing[-1:]
                work = Work(action.stage, action.microbatch, action.sub)
                reads = (
                    graph.forward_inputs(work)
                    if action.type is ActionType.FORWARD
                    else graph.backward_inputs(work)
                )
                if action.type is not ActionType.WEIGHT_GRAD:
                    waits += [m.receive for m in reads if graph.crosses_ranks(m)]
                computing.append(action)
            elif action.peer is not None:
                message = Message.of(action)
                peer = graph.partition[action.peer].rank
                own = posted.setdefault((peer, message.is_gradient, action.type.is_receive), [])
                waits += own[-num_communicators:][:1] if len(own) >= num_communicators else []
                own.append(action)
                waits += [] if action.type.is_receive else computing[-1:]
            self.after_end[action] = waits
            self.after_start[action] = list(line[max(0, place - 1) : place])

    def other_side(self, action: Action) -> Action | None:
        if action.peer is None:
            return None
        message = Message.of(action)
        return message.send if action.type.is_receive else message.receive

    def duration_us(self, action: Action) -> float:
        graph = self.plan.graph
        if action.type is ActionType.REDUCE_GRAD:
            return 0.0
        if action.peer is None:
            work = Work(action.stage, action.microbatch, action.sub)
            return float(self._times[action.type][graph.numbers[work]])
        message = Message.of(action)
        upstream = Work(message.upstream_stage, message.microbatch, message.sub)
        return float(self._transfer_us[graph.numbers[upstream]])

    def times_us(self) -> dict[Action, tuple[float, float]]:
        """Starts and ends of all actions that ever end, found by going round until none is new."""
        starts: dict[Action, float] = {}
        ends: dict[Action, float] = {}
        found = -1
        while found < len(starts) + len(ends):
            found = len(starts) + len(ends)
            for action, waits in self.after_end.items():
                before = self.after_start[action]
                if all(w in ends for w in waits) and all(b in starts for b in before):
                    times = [ends[w] for w in waits] + [starts[b] for b in before]
                    starts.setdefault(action, max(times, default=0.0))
                other = self.other_side(action)
                if action in starts and (other is None or other in starts):
                    late = max(starts[action], starts[other] if other else 0.0)
                    ends[action] = late + self.duration_us(action)
        return {action: (starts[action], ends[action]) for action in ends}

    def acts_out(self, limit_s: float) -> bool:
        """Whether threads, a hardware queue each, come to their end when they act it out."""
        started = {action: threading.Event() for action in self.after_end}
        ended = {action: threading.Event() for action in self.after_end}
        lock, given_up = threading.Lock(), threading.Event()

        def wait(event: threading.Event) -> bool:
            while not event.wait(0.01):
                if given_up.is_set():
                    return False
            return True

        def run(line: Sequence[Action]) -> None:
            for action in line:
                if not all(wait(ended[other]) for other in self.after_end[action]):
                    return
                with lock:
                    started[action].set()
                    other = self.other_side(action)
                    if other is None or started[other].is_set():
                        for side in (action, other or action):
                            ended[side].set()

        threads = [threading.Thread(target=run, args=(line,)) for line in self.plan.actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(limit_s)
        given_up.set()
        for thread in threads:
            thread.join()
        return all(event.is_set() for event in ended.values())


# ---- the model -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 3), st.booleans(), st.sampled_from(["dual_queue", "one_f_one_b"]))
def test_every_plan_for_one_queue_runs_to_its_end_and_takes_what_the_rules_say(
    case, communicators, split_backward, algorithm
):
    problem, partition = case
    queues = QueueModel(communicators=communicators)
    options = {"algorithm": algorithm, "split_backward": split_backward, "max_tokens": {}}
    plan = make_plan(problem, partition, queues=queues, **options)
    expected = Rules(plan).times_us()
    assert set(expected) == {action for line in plan.actions for action in line}
    simulation = simulate(plan)
    found = {
        one.action: (one.start_us, one.end_us) for line in simulation.timelines for one in line
    }
    assert found == {action: expected[action] for action in found}
    assert plan.estimate == simulation.estimate(plan.estimate.lower_bound_us)
    # Lowered for many queues, it runs under one as well, and is no faster.
    in_order = make_plan(problem, partition, **options)
    same = replace(in_order, queues=queues)
    validate_plan(same)
    assert simulate(same).makespan_us >= plan.estimate.makespan_us


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_validation_refuses_exactly_what_the_rules_let_hang(case, random):
    """Receives of a good plan moved forward by some places, in their channels' order."""
    plan = make_plan(*case, queues=ONE)
    ranks = []
    for line in plan.actions:
        moved: list[Action] = []
        for action in line:
            place = len(moved)
            while action.type.is_receive and place and random.random() < 0.6:
                if moved[place - 1].type.is_receive:
                    break
                place -= 1
            moved.insert(place, action)
        ranks.append(moved)
    changed = with_ranks(plan, ranks)
    if len(Rules(changed).times_us()) == sum(map(len, ranks)):
        validate_plan(changed)
    else:
        with pytest.raises(PlanDeadlockError, match="with one hardware queue"):
            validate_plan(changed)
        with pytest.raises(PlanDeadlockError, match="megatron-dip validate"):
            simulate(changed)


def test_a_second_receive_that_is_posted_early_hangs_and_the_message_says_where():
    plan = make_plan(*chain_case(2, 2), queues=ONE)
    validate_plan(plan)
    with pytest.raises(PlanDeadlockError, match=r"rank 0: 0RECV_B1<1.*behind what"):
        validate_plan(posted_first(plan))


def test_threads_that_act_out_hardware_queues_end_or_hang_as_validation_says():
    for case in (chain_case(3, 4), encoder_case(latency_us=0.25)):
        plan = make_plan(*case, queues=ONE)
        assert Rules(plan).acts_out(PATIENCE_S)
        early = posted_first(plan)
        with pytest.raises(PlanDeadlockError):
            validate_plan(early)
        assert not Rules(early).acts_out(HANG_S)


def test_a_receive_goes_behind_the_action_in_which_the_one_before_it_arrives():
    problem, partition = chain_case(2, 2, latency_us=0.5)
    order = (parse_actions("0F0 0F1 0B0 0B1"), parse_actions("1F0 1F1 1B0 1B1"))
    graph = make_plan(problem, partition).graph
    placed = plan_from_order(graph, order, queues=ONE)
    # Microbatch 1 leaves rank 0 at 2, in 1F0 (1.5 to 2.5), in which microbatch 0 is there.
    assert placed.to_text().splitlines()[1].startswith("1RECV_F0<0 1RECV_F1<0 1F0")
    slow = chain_case(2, 2, latency_us=1.5)[0]
    graph = make_plan(slow, partition).graph
    placed = plan_from_order(graph, order, queues=ONE)
    # At 2, microbatch 0 is on its way until 2.5: what stands behind a receive would wait.
    assert placed.to_text().splitlines()[1].startswith("1RECV_F0<0 1F0 1RECV_F1<0 1F1")
    assert placed.estimate.makespan_us == plan_from_order(graph, order).estimate.makespan_us


def test_two_communicators_let_two_messages_wait():
    plan = make_plan(*chain_case(2, 2), queues=QueueModel(communicators=2))
    early = posted_first(plan)
    with pytest.raises(PlanDeadlockError):
        validate_plan(early)
    validate_plan(replace(early, queues=QueueModel(communicators=2)))


# ---- lazy communicators --------------------------------------------------------------------------


def first_uses_end(plan: Plan, num_communicators: int) -> bool:
    """Whether hosts end that wait, at the first transfer of a communicator, for its other end."""
    uses: dict[Action, Action] = {}
    for line in plan.actions:
        count: dict[tuple[int, bool, bool], int] = {}
        for action in line:
            if action.peer is None:
                continue
            message = Message.of(action)
            peer = plan.partition[action.peer].rank
            key = (peer, message.is_gradient, action.type.is_receive)
            count[key] = count.get(key, 0) + 1
            if count[key] <= num_communicators:
                uses[action] = message.send if action.type.is_receive else message.receive
    heads = [0] * len(plan.actions)
    has_moved = True
    while has_moved:
        has_moved = False
        at_head = {line[h] for line, h in zip(plan.actions, heads, strict=True) if h < len(line)}
        for rank, line in enumerate(plan.actions):
            if (
                heads[rank] < len(line)
                and uses.get(line[heads[rank]], line[heads[rank]]) in at_head
            ):
                # Both ends of a meeting go on in the same round.
                heads[rank] += 1
                has_moved = True
    return all(head == len(line) for head, line in zip(heads, plan.actions, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_plans_for_many_queues_meet_at_first_uses_in_one_order(case):
    """Unchanged lists do even without channels that are opened before."""
    assert first_uses_end(make_plan(*case), 1)


def test_receives_that_are_posted_early_need_channels_that_are_open():
    from_both_sides = encoder_case()
    plan = make_plan(*from_both_sides)
    ranks = [
        parse_actions("2RECV_B1<3 0F0") + tuple(plan.actions[0]),
        parse_actions("1RECV_F0<0") + tuple(plan.actions[1]),
    ]
    assert first_uses_end(plan, 1)
    assert not first_uses_end(with_ranks(plan, ranks), 1)


# ---- forms ---------------------------------------------------------------------------------------


def test_a_plan_says_its_queues_and_one_for_many_says_nothing():
    case = chain_case(2, 3)
    assert "queues" not in make_plan(*case).to_json()
    plan = make_plan(*case, queues=QueueModel(communicators=2))
    form = plan.to_json()
    assert form["queues"] == {"hardware_queues": "one", "communicators": 2}
    assert parse_plan(form) == plan


def test_channels_beyond_the_streams_of_a_device_get_one_communicator():
    upstream = {"language": ()}
    near = partition_from_layers({"language": [[1, 1, 1, 1]]}, 4)
    assert one_queue_model(near, upstream) == QueueModel(communicators=2)
    # Rank 0 exchanges with 19 others: 38 channels end there.
    layers = [[1] + [int(rank == other) for rank in range(1, 20)] for other in range(1, 20)]
    star = partition_from_layers({"language": layers}, 20)
    assert one_queue_model(star, upstream) == QueueModel(communicators=1)


def test_the_restriction_of_a_joint_plan_keeps_its_queues_and_runs_to_its_end():
    problems = [encoder_case()[0], chain_and_images()]
    partition = encoder_case()[1]
    joint = make_plan(joint_problem(problems), partition, queues=QueueModel(communicators=2))
    for problem in problems:
        restricted = restrict_plan(joint, problem)
        assert restricted.queues == joint.queues
        assert restricted.estimate == simulate(restricted).estimate(
            restricted.estimate.lower_bound_us
        )


def chain_and_images():
    """Two microbatches with one image each."""
    problem = encoder_case()[0]
    images = problem.microbatches[0]["vision"][:1]
    microbatches = tuple({**m, "vision": images} for m in problem.microbatches)
    return problem.model_copy(update={"microbatches": microbatches})


def test_times_of_the_model_do_not_depend_on_noise_in_what_actions_take():
    """No times can bring a valid plan to rest: durations that no simulation knew."""
    plan = make_plan(*chain_case(3, 5), queues=ONE)
    rules = Rules(plan)
    random = np.random.default_rng(0)
    drawn = {action: random.uniform(0.0, 9.0) for action in rules.after_end}
    rules.duration_us = drawn.__getitem__  # type: ignore[method-assign]
    assert len(rules.times_us()) == sum(map(len, plan.actions))
