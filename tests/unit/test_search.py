"""The searches: against every possible schedule, against the planners, and twice the same."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    MODULE_GRAPHS,
    cases,
    chain_case,
    feeds_from,
    gradients_from,
    make_graph,
    make_item,
    make_problem,
    tightest_limits,
)

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.partition import partition_from_layers
from megatron_dip.planner import (
    default_priority,
    make_plan,
    order_dual_queue,
    pack_plan,
    search_schedule,
)
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.local_search import LocalSearch
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.simulator import (
    TaskTable,
    build_task_table,
    lower_bound_us,
    simulate_order,
)

SEARCHES = ["local", "mcts"]


def exhaustive_makespan_us(table: TaskTable) -> float:
    """The best of all orders: whatever is ready next, on any rank, in every sequence."""
    num_works = table.num_works
    tasks = list(range(num_works))
    tasks += [num_works + n for n in range(num_works) if table.has_backward[n]]
    waits: dict[int, list[tuple[int, float]]] = {}
    for task in tasks:
        number = task % num_works
        if task < num_works:
            waits[task] = list(feeds_from(table)[number])
        else:
            waits[task] = [(number, 0.0)]
            waits[task] += [(num_works + m, delay) for m, delay in gradients_from(table)[number]]

    @functools.cache
    def best(ends: tuple[tuple[int, float], ...], clocks: tuple[float, ...]) -> float:
        done = dict(ends)
        if len(done) == len(tasks):
            return max(clocks)
        found = []
        for task in tasks:
            if task in done or any(other not in done for other, _ in waits[task]):
                continue
            number = task % num_works
            duration = table.forward_us[number] if task < num_works else table.backward_us[number]
            rank = table.rank[number]
            inputs = [done[other] + delay for other, delay in waits[task]]
            end = max([clocks[rank], *inputs]) + duration
            after = (*clocks[:rank], end, *clocks[rank + 1 :])
            found.append(best(tuple(sorted({**done, task: end}.items())), after))
        return min(found)

    return best((), (0.0,) * table.num_ranks)


def three_microbatches(times: tuple[float, ...]) -> TaskTable:
    """Two ranks, one layer each, one microbatch per time."""
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 2},
        [{"language": [make_item(0, time)]} for time in times],
        num_ranks=2,
        latency_us=0.5,
    )
    return build_task_table(make_graph(problem, partition_from_layers({"language": [[1, 1]]}, 2)))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("times", [*itertools.permutations([1.0, 2.0, 5.0]), (1.0, 1.0, 5.0)])
def test_search_finds_the_best_of_all_schedules(search, times):
    table = three_microbatches(times)
    found = search_schedule(table, search=search, evaluations=300)
    assert found.makespan_us == exhaustive_makespan_us(table) >= lower_bound_us(table)
    assert simulate_order(table, found.order).makespan_us == found.makespan_us


def test_the_best_of_all_schedules_is_not_always_the_default_one():
    table = three_microbatches((1.0, 1.0, 5.0))
    default = simulate_order(table, order_dual_queue(table, default_priority(table)))
    assert default.makespan_us > exhaustive_makespan_us(table)


@given(
    case=cases(),
    search=st.sampled_from(SEARCHES),
    split_backward=st.booleans(),
    evaluations=st.sampled_from([1, 7, 80]),
    is_tight=st.booleans(),
)
@settings(max_examples=100)
def test_search_is_never_worse_than_the_dual_queue_and_keeps_the_limit(
    case, search, split_backward, evaluations, is_tight
):
    problem, partition = case
    if is_tight:
        limits = tightest_limits(make_graph(problem, partition))
        problem = problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    table = build_task_table(make_graph(problem, partition))
    order = order_dual_queue(table, default_priority(table), split_backward=split_backward)
    found = search_schedule(
        table, search=search, evaluations=evaluations, split_backward=split_backward
    )
    simulation = simulate_order(table.with_recompute(found.num_recomputed), found.order)
    assert simulation.makespan_us == found.makespan_us
    assert found.makespan_us <= simulate_order(table, order).makespan_us
    limits = problem.memory_limit_bytes
    assert all(peak <= limit for peak, limit in zip(simulation.peak_bytes, limits, strict=True))


@given(case=cases(), search=st.sampled_from(SEARCHES), split_backward=st.booleans())
@settings(max_examples=30)
def test_same_seed_and_evaluations_give_the_same_plan(case, search, split_backward):
    options = {
        "search": search,
        "evaluations": 90,
        "seed": 5,
        "split_backward": split_backward,
        "max_tokens": {module.name: 1 for module in case[0].modules},
    }
    first, second = make_plan(*case, **options), make_plan(*case, **options)
    assert pack_plan(first, ()) == pack_plan(second, ())
    fallback = make_plan(*case, **(options | {"search": "local", "evaluations": 1}))
    assert first.estimate.makespan_us <= fallback.estimate.makespan_us


def twelve_microbatches() -> TaskTable:
    """Of times so unlike that different searches find different schedules."""
    times = [1.0, 7.0, 2.5, 4.0, 1.5, 9.0, 3.0, 5.5, 0.5, 6.0, 2.0, 8.0]
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 6},
        [{"language": [make_item(0, time)]} for time in times],
        num_ranks=3,
        latency_us=0.5,
    )
    partition = partition_from_layers({"language": [[1, 1, 1], [1, 1, 1]]}, 3)
    return build_task_table(make_graph(problem, partition))


@pytest.mark.parametrize("search", SEARCHES)
def test_the_seed_alone_decides_between_runs(search):
    table = twelve_microbatches()

    def found(seed: int) -> list[int]:
        return search_schedule(table, search=search, evaluations=120, seed=seed).order.task.tolist()

    seeds = range(6)
    assert [found(seed) for seed in seeds] == [found(seed) for seed in seeds]
    assert any(found(seed) != found(0) for seed in seeds)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_budget_in_milliseconds_ends(search):
    table = build_task_table(make_graph(*chain_case(3, 4, latency_us=0.1)))
    assert search_schedule(table, search=search, budget_ms=5.0).makespan_us > 0


@pytest.mark.parametrize(
    "budget",
    [
        Budget(),
        Budget(0),
        Budget(-1),
        Budget(None, 0.0),
        Budget(None, float("inf")),
        Budget(3, 3.0),
    ],
)
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ConfigError, match="expected exactly one of the two, above zero"):
        budget.check()


def test_a_search_without_room_for_a_microbatch_says_so():
    problem, partition = chain_case(2, 2, memory_limit_bytes=[100, 9])
    table = build_task_table(make_graph(problem, partition))
    with pytest.raises(InfeasibleError, match="rank 1: microbatch 0 needs 10 bytes"):
        search_schedule(table, evaluations=3, memory_program=False)


def test_a_point_that_comes_again_is_not_scheduled_again():
    table = build_task_table(make_graph(*chain_case(2, 3)))
    evaluator = Evaluator(table, Budget(9), split_backward=False, goal_us=0.0)
    portfolio = Portfolio(table, evaluator.forwards)
    point = portfolio.point(portfolio.rules()[0], portfolio.microbatch_orders()[0])
    assert evaluator.evaluate(point) is evaluator.evaluate(point)
    assert evaluator.num_evaluations == 2
    other = portfolio.point(portfolio.rules()[0], portfolio.microbatch_orders()[1])
    assert evaluator.evaluate(point) is not evaluator.evaluate(other)


def test_searches_of_a_batch_go_on_from_the_best_of_them():
    table = twelve_microbatches()
    searches = []
    for part, evaluations in enumerate((40, 120)):
        evaluator = Evaluator(table, Budget(evaluations), split_backward=False, goal_us=0.0)
        evaluator.allow(0.5)
        search = LocalSearch(evaluator, seed=part, part=part, num_parts=2)
        search.run()
        assert evaluations / 2 <= evaluator.num_evaluations < evaluations
        searches.append((evaluator, search))
    best_us, worst_us = sorted(search.makespan_us for _, search in searches)
    assert best_us < worst_us
    for evaluator, search in searches:
        for _, other in searches:
            search.go_on_from(other)
        assert search.makespan_us == best_us
        evaluator.allow(1.0)
        search.run()
        assert evaluator.is_over
        assert search.makespan_us <= best_us


def test_the_best_of_every_family_of_rules_is_improved():
    """What is slow at first often leads further than the fastest."""
    batches = [
        {"vision": [make_item(k, 1.0 + n % 5) for k in range(n % 4)]}
        | {"language": [make_item(0, 2.0 + n % 3)]}
        for n in range(8)
    ]
    layers = {"vision": 4, "language": 4}
    problem = make_problem(MODULE_GRAPHS["encoder"], layers, batches, num_ranks=2)
    cut = partition_from_layers({"vision": [[1, 1], [1, 1]], "language": [[2, 2]]}, 2)
    table = build_task_table(make_graph(problem, cut))
    budget = Budget(evaluations=10_000)
    evaluator = Evaluator(table, budget, split_backward=False, goal_us=0.0)
    search = LocalSearch(evaluator, seed=0)
    improved = []

    def descend(schedule, noise_us, *_):
        if noise_us.any():
            raise StopIteration
        improved.append(schedule.makespan_us)

    search._descend = descend
    with pytest.raises(StopIteration):
        search.run()
    assert len(improved) == 5
    assert improved == sorted(improved)
    assert improved[0] < improved[-1]
