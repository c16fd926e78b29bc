"""Plans for one hardware queue: the model, what it refuses, where receives go, what that takes."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, chain_case, encoder_case, sizes_of

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
    pipeline_channels,
)
from megatron_dip.plan.numbers import number_actions
from megatron_dip.plan.progress import hosts_meet
from megatron_dip.plan.queues import ActionLists
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import (
    PlannerSettings,
    make_plan,
    pack_plan,
    plan_from_order,
    plan_in_rounds,
    unpack_plan,
)
from megatron_dip.planner.joint import joint_problem, restrict_plan
from megatron_dip.simulator import simulate
from megatron_dip.simulator.tasks import build_task_table
from megatron_dip.workload import StageFactor

ONE = QueueModel(communicators=1)


def posted_early(line: Sequence[Action]) -> list[Action]:
    """Every receive before the compute action that it follows."""
    moved: list[Action] = []
    last = 0
    for action in line:
        if action.type.is_receive:
            moved.insert(last, action)
            last += 1
            continue
        last = len(moved) if action.type.is_compute else last
        moved.append(action)
    return moved


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


@settings(max_examples=40, deadline=None)
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
    # Evaluation leaves out everything but forwards and their messages.
    kept = ("F", "SEND_F", "RECV_F")
    forwards = [[one for one in line if one.type.value in kept] for line in plan.actions]
    ended = Rules(replace(plan, actions=tuple(map(tuple, forwards)))).times_us()
    assert len(ended) == sum(map(len, forwards))
    # Lowered for many queues, it runs under one as well, and is no faster.
    in_order = make_plan(problem, partition, **options)
    same = replace(in_order, queues=queues)
    validate_plan(same)
    assert simulate(same).makespan_us >= plan.estimate.makespan_us


@settings(max_examples=40, deadline=None)
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
    problem, partition = chain_case(2, 3)
    slow = problem.model_copy(update={"stage_factors": {1: StageFactor(4.0, 4.0)}})
    order = (
        parse_actions("0F0 0F1 0F2 0B0 0B1 0B2"),
        parse_actions("1F0 1F1 1F2 1B0 1B1 1B2"),
    )
    graph = make_plan(slow, partition).graph
    # Microbatches 1 and 2 leave rank 0 at 2 and 3, while rank 1 is in 1F0 from 1 to 5.
    in_order = plan_from_order(graph, order)
    assert in_order.to_text().splitlines()[1].startswith("1RECV_F0<0 1RECV_F1<0 1RECV_F2<0 1F0")
    # The receive of 2 cannot start before that of 1 has ended, and 1F0 stands behind it.
    assert simulate(replace(in_order, queues=ONE)).timelines[1][0].start_us == 2.0
    placed = plan_from_order(graph, order, queues=ONE)
    assert placed.to_text().splitlines()[1].startswith("1RECV_F0<0 1F0 1RECV_F1<0 1RECV_F2<0 1F1")
    assert simulate(placed).timelines[1][0].start_us == 1.0
    assert placed.estimate.makespan_us == in_order.estimate.makespan_us


def test_two_communicators_let_two_messages_wait():
    plan = make_plan(*chain_case(2, 2), queues=QueueModel(communicators=2))
    early = posted_first(plan)
    with pytest.raises(PlanDeadlockError):
        validate_plan(early)
    validate_plan(replace(early, queues=QueueModel(communicators=2)))


# ---- lazy communicators --------------------------------------------------------------------------


def meet(plan: Plan, num_communicators: int = 1) -> bool:
    numbers = number_actions(plan.graph, plan.actions)
    lists = ActionLists(numbers.first, numbers.rank, numbers.type, numbers.number)
    return hosts_meet(plan.graph.wiring, lists, num_communicators)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(1, 3))
def test_hosts_meet_at_first_uses_where_receives_stand_in_the_order_of_sends(case, communicators):
    assert meet(make_plan(*case), communicators)


def test_receives_that_are_posted_early_need_channels_that_are_open():
    plan = make_plan(*encoder_case())
    assert meet(plan)
    ranks = [posted_early(line) for line in plan.actions]
    assert not meet(with_ranks(plan, ranks))


def test_hosts_meet_where_all_open_their_channels_in_one_order():
    """As ``Channels.connect`` does it: each rank waits on one channel after the other."""
    cut = {"vision": [[1, 0, 1, 1], [1, 1, 0, 1]], "language": [[1, 1, 1, 1], [0, 1, 1, 0]]}
    partition = partition_from_layers(cut, 4)
    channels = pipeline_channels(partition, {"vision": (), "language": ("vision",)})
    left = [[c for c in channels if rank in (c.sender, c.receiver)] for rank in range(4)]
    while any(left):
        heads = [own[0] for own in left if own]
        met = next(c for c in heads if left[c.sender][0] == left[c.receiver][0] == c)
        left[met.sender].pop(0)
        left[met.receiver].pop(0)


# ---- forms ---------------------------------------------------------------------------------------


def test_a_plan_says_its_queues_and_one_for_many_says_nothing():
    case = chain_case(2, 3)
    assert "queues" not in make_plan(*case).to_json()
    plan = make_plan(*case, queues=QueueModel(communicators=2))
    form = plan.to_json()
    assert form["queues"] == {"hardware_queues": "one", "communicators": 2}
    assert parse_plan(form) == plan
    problem, partition = case
    sizes = sizes_of(problem)
    packed = pack_plan(plan, [sizes])
    assert unpack_plan(packed, lambda _: problem, partition, own=sizes).plan == plan


def test_all_plans_of_a_run_are_for_its_queues(monkeypatch):
    """The searched one, the one without a search, and what is left where planning fails."""
    problem, partition = encoder_case()
    settings = PlannerSettings(algorithm="dual_queue", evaluations=80, queues=QueueModel())
    found = list(plan_in_rounds(problem, partition, settings, limit_ms=1e9))
    assert len(found) > 1
    assert {one.plan.queues for one in found} == {QueueModel()}

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PlannerSettings, "first_plan", fail)
    assert settings.fallback(problem, partition).queues == QueueModel()


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
