"""The planners: properties over random problems, memory, and sub-microbatches."""

import cProfile
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    MODULE_GRAPHS,
    cases,
    chain_case,
    encoder_case,
    feeds_from,
    gradients_from,
    make_graph,
    make_item,
    make_problem,
    sizes_of,
    tightest_limits,
)

from megatron_dip.errors import InfeasibleError, PlanError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import (
    Action,
    ActionType,
    Work,
    format_actions,
    parse_plan,
)
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import (
    default_priority,
    form_sub_microbatches,
    make_plan,
    order_dual_queue,
    order_one_f_one_b,
    pack_plan,
    unpack_plan,
)
from megatron_dip.planner.dual_queue import Priority, priority_key
from megatron_dip.planner.greedy import schedule_greedily
from megatron_dip.planner.kernels import ALTERNATE
from megatron_dip.planner.one_f_one_b import in_flight_limits
from megatron_dip.planner.rules import BatchRules
from megatron_dip.simulator import build_task_table, simulate, simulate_order
from megatron_dip.simulator.simulate import decode_order


@given(
    case=cases(),
    algorithm=st.sampled_from(["dual_queue", "one_f_one_b"]),
    split_backward=st.booleans(),
    max_tokens=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=300)
def test_any_problem_gets_a_valid_plan_that_survives_its_forms(
    case, algorithm, split_backward, max_tokens
):
    problem, partition = case
    options = {
        "algorithm": algorithm,
        "split_backward": split_backward,
        "max_tokens": {module.name: max_tokens for module in problem.modules},
    }
    plan = make_plan(problem, partition, **options)
    validate_plan(plan)
    sends = [a for line in plan.actions for a in line if a.type.is_send]
    receives = [a for line in plan.actions for a in line if a.type.is_receive]
    assert len(sends) == len(receives) == len(set(sends))
    estimate = plan.estimate
    assert estimate.makespan_us >= estimate.lower_bound_us * (1 - 1e-12)
    assert simulate(plan).estimate(estimate.lower_bound_us) == estimate
    assert parse_plan(json.loads(json.dumps(plan.to_json()))) == plan
    sizes = sizes_of(problem)
    packed = pack_plan(plan, [sizes])
    assert unpack_plan(packed, lambda _: problem, partition, own=sizes) == (plan, sizes)
    assert pack_plan(make_plan(problem, partition, **options), [sizes]) == packed


@given(case=cases(), split_backward=st.booleans(), data=st.data())
@settings(max_examples=100)
def test_dual_queue_fits_the_tightest_limit_under_any_priority(case, split_backward, data):
    problem, partition = case
    limits = tightest_limits(make_graph(problem, partition))
    tight = problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    table = build_task_table(make_graph(tight, partition))
    order = data.draw(st.permutations(range(problem.num_microbatches)))
    numbers = data.draw(st.permutations(range(table.num_works)))
    priority = Priority(
        forward_keys=[(number,) for number in numbers],
        backward_keys=[(-number,) for number in numbers],
        microbatch_order=tuple(order),
    )
    simulation = simulate_order(
        table, order_dual_queue(table, priority, split_backward=split_backward)
    )
    assert all(peak <= limit for peak, limit in zip(simulation.peak_bytes, limits, strict=True))


@given(case=cases())
@settings(max_examples=40)
def test_dual_queue_plan_is_never_slower_than_one_f_one_b(case):
    slow = make_plan(*case, algorithm="one_f_one_b")
    assert make_plan(*case).estimate.makespan_us <= slow.estimate.makespan_us


def test_a_microbatch_that_does_not_fit_names_rank_need_and_limit():
    problem, partition = chain_case(2, 2, memory_limit_bytes=[100, 9])
    table = build_task_table(make_graph(problem, partition))
    with pytest.raises(InfeasibleError, match=r"rank 1: microbatch 0 needs 10 bytes .*limit 9"):
        order_dual_queue(table, default_priority(table))


def test_an_infeasible_problem_says_what_is_missing_and_what_helps():
    problem, partition = chain_case(2, 2, memory_limit_bytes=[100, 3], layer_static_bytes=1)
    expected = (
        r"rank 1: microbatch 0 needs 5 bytes with the weights, with all of its layers recomputed "
        r"\(limit 3, 2 missing: use smaller microbatches, more ranks or a higher limit\)"
    )
    with pytest.raises(InfeasibleError, match=expected):
        make_plan(problem, partition)


def test_weights_above_the_limit_are_said_to_be_alone_too_much():
    problem, partition = chain_case(2, 2, memory_limit_bytes=[100, 6], layer_static_bytes=7)
    with pytest.raises(
        InfeasibleError, match=r"rank 1: its weights alone take 7 bytes .*1 missing"
    ):
        make_plan(problem, partition)


@pytest.mark.parametrize("evaluations", [None, 20])
def test_training_takes_the_plan_that_needs_least_where_none_fits(caplog, evaluations):
    problem, partition = chain_case(2, 3, memory_limit_bytes=[100, 3])
    plan = make_plan(problem, partition, evaluations=evaluations, when_infeasible="least_memory")
    assert "no plan keeps the memory limit, taking one that needs least: rank 1" in caplog.text
    assert plan.problem == problem
    assert simulate(plan).peak_bytes[1] == 4


def test_memory_limit_holds_microbatches_back():
    problem, partition = chain_case(4, 8, memory_limit_bytes=[20, 20, 20, 20])
    plan = make_plan(problem, partition, memory_program=False)
    assert not plan.recompute
    check_memory(plan, simulate(plan).peak_bytes)
    free = make_plan(*chain_case(4, 8))
    assert max(free.estimate.peak_bytes) > 20
    assert plan.estimate.makespan_us > free.estimate.makespan_us


def test_split_backward_fills_gaps():
    whole = make_plan(*chain_case(4, 4))
    split = make_plan(*chain_case(4, 4), split_backward=True)
    assert split.estimate.makespan_us < whole.estimate.makespan_us


def test_dual_queue_alternates_where_both_queues_have_work():
    problem, partition = chain_case(1, 3)
    table = build_task_table(make_graph(problem, partition))
    lines = decode_order(table, order_dual_queue(table, default_priority(table)))
    kinds = [action.type.value for action in lines[0]]
    assert kinds == ["F", "B"] * 3


@given(case=cases())
@settings(max_examples=100)
def test_dual_queue_lets_no_rank_idle_while_it_has_something_to_do(case):
    table = build_task_table(make_graph(*case))
    simulation = simulate_order(table, order_dual_queue(table, default_priority(table)))
    ends = {t.action: t.end_us for line in simulation.timelines for t in line}
    feeds, returns = feeds_from(table), gradients_from(table)

    def end_of(number: int, kinds: str) -> float:
        actions = [table.graph.works[number].action(ActionType(kind)) for kind in kinds]
        return next(ends[action] for action in actions if action in ends)

    def arrival(action: Action) -> float:
        number = table.graph.numbers[Work(action.stage, action.microbatch, action.sub)]
        if action.type is ActionType.FORWARD:
            return max([0.0, *(end_of(n, "F") + d for n, d in feeds[number])])
        gradients = [end_of(n, "BI") + d for n, d in returns[number]]
        return max([end_of(number, "F"), *gradients])

    for line in simulation.timelines:
        clock = 0.0
        for index, (_, start_us, end_us) in enumerate(line):
            if start_us > clock:
                assert min(arrival(later.action) for later in line[index:]) >= start_us
            clock = end_us


@given(case=cases(), split_backward=st.booleans())
@settings(max_examples=100)
def test_the_engine_and_the_simulator_agree_on_every_start(case, split_backward):
    problem, partition = case
    limits = tightest_limits(make_graph(problem, partition))
    tight = problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    table = build_task_table(make_graph(tight, partition))
    batch = BatchRules.forwards(table, split_backward=split_backward)
    priority = default_priority(table)
    rules = batch.make(priority_key(priority), ALTERNATE, np.array(priority.microbatch_order))
    schedule = schedule_greedily(batch, rules)
    simulation = simulate_order(table, schedule.order)
    assert schedule.starts_us.tolist() == simulation.starts_us.tolist()
    assert schedule.makespan_us == simulation.makespan_us


def test_dual_queue_goes_on_with_forwards_while_gradients_are_under_way():
    def kinds_on_rank_0(latency_us: float) -> str:
        problem, partition = chain_case(2, 8, latency_us=latency_us)
        table = build_task_table(make_graph(problem, partition))
        line = decode_order(table, order_dual_queue(table, default_priority(table)))[0]
        return "".join(action.type.value for action in line)

    assert kinds_on_rank_0(100.0) == "F" * 8 + "B" * 8
    assert kinds_on_rank_0(0.0).startswith("FFFFB")


def test_one_f_one_b_is_the_classic_order():
    problem, partition = chain_case(3, 4)
    table = build_task_table(make_graph(problem, partition))
    lines = decode_order(table, order_one_f_one_b(table))
    assert [format_actions(line) for line in lines] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_in_flight_limits_fall_along_the_longest_path():
    problem, _ = encoder_case()
    partition = partition_from_layers({"vision": [[1, 1]], "language": [[1, 1]]}, 2)
    assert in_flight_limits(make_graph(problem, partition)) == {0: 2, 1: 2, 2: 1, 3: 1}
    frozen, _ = encoder_case("frozen encoder")
    assert in_flight_limits(make_graph(frozen, partition)) == {2: 2, 3: 1}


def sub_items(tokens: list[int], limit: int | None) -> list[list[int]]:
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 1},
        [{"language": [make_item(i, tokens=count) for i, count in enumerate(tokens)]}],
        num_ranks=1,
    )
    groups = form_sub_microbatches(problem, {"language": limit})
    return [[tokens[item] for item in group.items] for group in groups]


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([4, 4, 4, 4], None, [[4, 4, 4, 4]]),
        ([4, 4, 4, 4], 16, [[4, 4, 4, 4]]),
        ([4, 4, 4, 4], 15, [[4, 4], [4, 4]]),
        ([4, 4, 4, 4, 4], 16, [[4, 4, 4], [4, 4]]),
        ([9, 4, 4], 8, [[9], [4, 4]]),
        ([4, 9, 4], 8, [[4], [9], [4]]),
        ([5, 5, 5], 8, [[5], [5], [5]]),
        ([0, 0], 8, [[0, 0]]),
        ([], 8, []),
    ],
)
def test_sub_microbatches_are_balanced_and_in_order(tokens, limit, expected):
    assert sub_items(tokens, limit) == expected


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 25))
def test_sub_microbatches_keep_every_item_and_the_limit(tokens, limit):
    groups = sub_items(tokens, limit)
    assert [count for group in groups for count in group] == tokens
    assert all(sum(group) <= limit or len(group) == 1 for group in groups)


def test_a_wrong_sub_microbatch_size_is_refused():
    problem, _ = chain_case(1, 1)
    with pytest.raises(PlanError, match="unknown module 'visoin'"):
        form_sub_microbatches(problem, {"visoin": 4})
    with pytest.raises(PlanError, match="language: 0"):
        form_sub_microbatches(problem, {"language": 0})


def test_a_partition_says_how_finely_its_modules_are_split():
    problem, partition = encoder_case()
    sized = partition.model_copy(update={"sub_microbatch_tokens": {"vision": 1}})
    assert len(make_plan(problem, partition).graph.subs("vision", 0)) == 1
    assert len(make_plan(problem, sized).graph.subs("vision", 0)) == 2
    assert len(make_plan(problem, sized, max_tokens={"vision": None}).graph.subs("vision", 0)) == 1


def test_planning_calls_few_python_functions_per_action():
    problem, partition = chain_case(8, 64)
    make_plan(problem, partition, evaluations=1)
    profile = cProfile.Profile()
    plan = profile.runcall(make_plan, problem, partition, evaluations=1)
    num_calls = sum(entry.callcount for entry in profile.getstats())
    # Action objects are made once each, by a few calls; all else is done on arrays.
    assert num_calls < 6 * sum(map(len, plan.actions))


def test_of_a_stage_only_layers_with_a_backward_are_recomputed():
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 3},
        [{"language": [make_item()]}],
        num_ranks=1,
        module_fields={
            "language": {"trained_layers": [[2, 3]], "first_layer_extra": {"trainable": False}}
        },
        memory_limit_bytes=[9],
    )
    plan = make_plan(problem, partition_from_layers({"language": [[3]]}, 1))
    validate_plan(plan)
    assert [entry.layers for entry in plan.recompute] == [(2,)]
