"""The simulator against known times, a slow second simulator, and bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    cases,
    chain_case,
    encoder_case,
    make_graph,
    message_bytes,
    written_cost,
)

from megatron_dip.errors import PlanDeadlockError, PlanError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Action, ActionType, PipelineGraph, Recompute, parse_actions
from megatron_dip.plan.numbers import decode_tasks
from megatron_dip.planner import (
    default_priority,
    order_dual_queue,
    order_one_f_one_b,
    plan_from_order,
)
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.simulator import (
    build_task_table,
    lower_bound_us,
    simulate,
    simulate_order,
    useful_work_us,
)
from megatron_dip.simulator.bounds import heads_us, tails_us
from megatron_dip.simulator.simulate import decode_order, encode_order


def brute_force_ends(graph: PipelineGraph, order) -> dict[Action, float]:
    """Ends of all actions, straight from the rules: repeat them until nothing moves any more."""
    ends = {action: 0.0 for actions in order for action in actions}

    def arrival(message) -> float:
        kinds = "BI" if message.is_gradient else "F"
        made = [
            ends[work.action(ActionType(kind))]
            for work in graph.contributors(message)
            for kind in kinds
            if work.action(ActionType(kind)) in ends
        ]
        crossing = graph.crosses_ranks(message)
        bytes_moved = message_bytes(graph, message)
        return max(made) + crossing * graph.problem.transfer.time_us(bytes_moved)

    for _ in range(len(ends) + 1):
        before = dict(ends)
        for actions in order:
            clock = 0.0
            for action in actions:
                work = next(w for w in graph.works if w.action(action.type) == action)
                forward_us, input_grad_us, weight_grad_us = written_cost(graph, work)[:3]
                times = {
                    "F": (forward_us, [arrival(m) for m in graph.forward_inputs(work)]),
                    "W": (weight_grad_us, [ends.get(work.action(ActionType.INPUT_GRAD), 0.0)]),
                }
                gradients = [arrival(m) for m in graph.backward_inputs(work)]
                gradients.append(ends[work.action(ActionType.FORWARD)])
                times["I"] = (input_grad_us, gradients)
                times["B"] = (input_grad_us + weight_grad_us, gradients)
                duration, inputs = times[action.type.value]
                clock = ends[action] = max([clock, *inputs]) + duration
        if before == ends:
            return ends
    raise AssertionError("the order never settles")


@given(case=cases())
@settings(max_examples=60)
def test_simulator_agrees_with_brute_force(case):
    problem, partition = case
    graph = make_graph(problem, partition)
    table = build_task_table(graph)
    for split in (False, True):
        numbers = order_dual_queue(table, default_priority(table), split_backward=split)
        order = decode_order(table, numbers)
        simulation = simulate_order(table, order)
        found = {t.action: t.end_us for line in simulation.timelines for t in line}
        assert found == pytest.approx(brute_force_ends(graph, order))


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 2), (3, 5), (4, 8)])
def test_one_f_one_b_takes_its_closed_form(num_ranks, num_microbatches):
    problem, partition = chain_case(num_ranks, num_microbatches, forward_us=3.0)
    table = build_task_table(make_graph(problem, partition))
    simulation = simulate_order(table, order_one_f_one_b(table))
    assert simulation.makespan_us == (num_microbatches + num_ranks - 1) * (3.0 + 6.0)


def test_one_f_one_b_holds_one_microbatch_less_on_every_rank():
    problem, partition = chain_case(4, 8)
    table = build_task_table(make_graph(problem, partition))
    assert simulate_order(table, order_one_f_one_b(table)).peak_bytes == (40, 30, 20, 10)


def test_a_transfer_takes_latency_and_bytes_over_bandwidth():
    problem, partition = chain_case(2, 1, latency_us=10.0, bytes_per_us=2.0)
    table = build_task_table(make_graph(problem, partition))
    simulation = simulate_order(table, order_one_f_one_b(table))
    # F 1, transfer 10 + 4 / 2, F 1 and B 2, transfer, B 2
    assert simulation.makespan_us == 1 + 12 + 1 + 2 + 12 + 2
    assert simulation.busy_us == (3.0, 3.0)
    assert simulation.bubble_fraction == (1 - 3 / 30, 1 - 3 / 30)


def test_a_gradient_leaves_with_input_grad_where_the_backward_is_split():
    problem, partition = chain_case(2, 1)
    table = build_task_table(make_graph(problem, partition))
    whole = simulate_order(table, (parse_actions("0F0 0B0"), parse_actions("1F0 1B0")))
    split = simulate_order(table, (parse_actions("0F0 0B0"), parse_actions("1F0 1I0 1W0")))
    assert (whole.makespan_us, split.makespan_us) == (6.0, 5.0)


def test_recompute_takes_time_and_gives_memory():
    problem, partition = chain_case(2, 1)
    graph = make_graph(problem, partition)
    order = (parse_actions("0F0 0B0"), parse_actions("1F0 1B0"))
    plain = simulate(plan_from_order(graph, order))
    recomputed = simulate(plan_from_order(graph, order, [Recompute(1, 0, 0, (1,))]))
    assert recomputed.makespan_us == plain.makespan_us + 1.0
    assert (plain.peak_bytes, recomputed.peak_bytes) == ((10, 10), (10, 4))


def test_stages_without_backward_store_nothing():
    problem, partition = encoder_case("frozen encoder", layer_static_bytes=100)
    table = build_task_table(make_graph(problem, partition))
    vision_only = simulate_order(table, (parse_actions("0F0 0F0.1"), ()))
    assert vision_only.peak_bytes == (200, 200)


def test_actions_that_wait_for_each_other_are_reported_with_blocked_heads():
    problem, partition = chain_case(2, 1)
    table = build_task_table(make_graph(problem, partition))
    with pytest.raises(PlanDeadlockError, match="rank 0: 0B0, rank 1: 1F0"):
        simulate_order(table, (parse_actions("0B0 0F0"), parse_actions("1F0 1B0")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0F0 0F0 0B0", "0F0 comes twice"),
        ("0F0 0F9 0B0", "0F9 is not a compute action"),
        ("0B0", "waits for an action that no rank runs"),
        ("0F0 0I0", "0I0 is not what its backward is here"),
        ("0F0 0B0 0W0", "0B0 is not what its backward is here"),
    ],
)
def test_an_order_that_is_none_is_refused(line, message):
    problem, partition = chain_case(2, 1)
    table = build_task_table(make_graph(problem, partition))
    with pytest.raises(PlanError, match=message):
        simulate_order(table, (parse_actions(line), parse_actions("1F0 1B0")))


def test_lower_bound_of_a_chain_is_its_length_or_its_busiest_rank():
    one = chain_case(4, 1)
    table = build_task_table(make_graph(*one))
    # Four forwards, four backwards; split: four input gradients, the last weight gradient.
    assert lower_bound_us(table) == 4 + 8
    assert lower_bound_us(table, split_backward=True) == 4 + 4 + 1
    table = build_task_table(make_graph(*chain_case(4, 100)))
    # The last rank starts three forwards late and has three times a hundred to do; with whole
    # backwards three of them follow its last one.
    assert lower_bound_us(table) == 3 + 300 + 3 * 2
    assert lower_bound_us(table, split_backward=True) == 3 + 300


@given(case=cases(), data=st.data())
@settings(max_examples=60)
def test_the_table_has_the_costs_that_are_written_down(case, data):
    graph = make_graph(*case)
    bare = build_task_table(graph)
    counts = [data.draw(st.integers(0, layers)) for layers in bare.num_layers.tolist()]
    table = bare.with_recompute(np.array(counts))
    assert table.topology is bare.topology
    columns = (table.forward_us, table.input_grad_us, table.weight_grad_us, table.stored_bytes)
    for index, (work, count) in enumerate(zip(graph.works, counts, strict=True)):
        expected = written_cost(graph, work, count if table.has_backward[index] else 0)
        assert [column[index] for column in columns] == pytest.approx(expected)
    assert not bare.num_recomputed.any()


def best_makespan_us(table, split_backward: bool) -> float:
    """The shortest of many schedules of a batch."""
    rules = Evaluator(table, Budget(evaluations=99), split_backward=split_backward, goal_us=0.0)
    portfolio = Portfolio(table, rules.forwards)
    return min(rules.evaluate(portfolio.point(*start)).makespan_us for start in portfolio.starts())


@given(case=cases())
@settings(max_examples=60)
def test_no_schedule_beats_the_bound_of_its_kind(case):
    table = build_task_table(make_graph(*case))
    whole, split = (lower_bound_us(table, split_backward=kind) for kind in (False, True))
    assert split <= whole * (1 + 1e-12)
    for kind, bound in ((False, whole), (True, split)):
        assert best_makespan_us(table, kind) >= bound * (1 - 1e-12)


def most_of_any_works(table, rank: int) -> float:
    """Of all works of a rank with at least some head and some tail: head + works + tail."""
    graph = table.whole
    tasks = np.flatnonzero(graph.exists & (np.tile(graph.rank, 3) == rank))
    heads, us = heads_us(graph)[tasks], graph.duration_us[tasks]
    rests = tails_us(graph)[tasks] - us
    return max(
        (
            head + us[(heads >= head) & (rests >= rest)].sum() + rest
            for head in heads
            for rest in rests
            if ((heads >= head) & (rests >= rest)).any()
        ),
        default=0.0,
    )


@given(case=cases())
@settings(max_examples=60)
def test_the_bound_is_that_of_the_worst_works_of_a_rank(case):
    table = build_task_table(make_graph(*case))
    expected = max(most_of_any_works(table, rank) for rank in range(table.num_ranks))
    assert lower_bound_us(table) == pytest.approx(expected)


def test_useful_work_leaves_overheads_out():
    problem, partition = chain_case(2, 3, overhead_us=7.0)
    assert useful_work_us(problem) == 2 * 3 * 3.0
    del partition


def test_completion_order_respects_dependencies_of_work_that_takes_no_time():
    problem, _ = chain_case(3, 2, forward_us=0.0)
    partition = partition_from_layers({"language": [[1, 1, 1]]}, 3)
    table = build_task_table(make_graph(problem, partition))
    tasks = simulate_order(table, order_one_f_one_b(table)).completion_order
    done = decode_tasks(table.graph, tasks)
    for before, after in (("0F0", "1F0"), ("2F0", "2B0"), ("2B1", "1B1"), ("1B1", "0B1")):
        assert done.index(Action.parse(before)) < done.index(Action.parse(after))


@given(case=cases())
@settings(max_examples=40)
def test_an_order_given_as_numbers_is_the_order_given_as_actions(case):
    table = build_task_table(make_graph(*case))
    for split in (False, True):
        numbers = order_dual_queue(table, default_priority(table), split_backward=split)
        order = decode_order(table, numbers)
        encoded = encode_order(table, order)
        assert encoded.task.tolist() == numbers.task.tolist()
        assert encoded.first.tolist() == numbers.first.tolist()
        given, decoded = simulate_order(table, numbers), simulate_order(table, order)
        assert given.timelines == decoded.timelines
        assert given.peak_bytes == decoded.peak_bytes
