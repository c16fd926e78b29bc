"""Recomputation under a memory limit: against brute force, and in plans."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planning_cases import (
    MODULE_GRAPHS,
    cases,
    chain_case,
    make_graph,
    make_item,
    make_problem,
    tightest_limits,
)

from megatron_dip.errors import ConfigError, InfeasibleError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import make_plan, order_one_f_one_b, pack_plan, search_schedule
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.planner.local_search import STARTS_SHARE, LocalSearch
from megatron_dip.planner.memory import MemoryFitter
from megatron_dip.planner.memory_program import num_program_rows, solve_memory_program
from megatron_dip.planner.portfolio import Portfolio
from megatron_dip.simulator import TaskTable, build_task_table, simulate, simulate_order
from megatron_dip.simulator.arrays import TaskOrder

KINDS = [(3.0, 9), (1.0, 30), (4.0, 11), (1.5, 24), (5.0, 14), (2.0, 17)]
"""Times and bytes of microbatches."""


def uneven_table(limits: list[int], num_microbatches: int = 3, num_layers: int = 4) -> TaskTable:
    """Two ranks with half of the layers each, and microbatches of unlike times and bytes."""
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": num_layers},
        [
            {"language": [make_item(0, time, activation_bytes=size, boundary_bytes=2)]}
            for time, size in itertools.islice(itertools.cycle(KINDS), num_microbatches)
        ],
        num_ranks=2,
        memory_limit_bytes=limits,
        latency_us=0.25,
    )
    partition = partition_from_layers({"language": [[num_layers // 2] * 2]}, 2)
    return build_task_table(make_graph(problem, partition))


def forwards_first(table: TaskTable) -> TaskOrder:
    """Everything is held at once."""
    lines = [np.flatnonzero(table.rank == rank) for rank in range(table.num_ranks)]
    tasks = np.concatenate([np.concatenate([line, table.num_works + line]) for line in lines])
    return TaskOrder(tasks, np.cumsum([0, *(2 * len(line) for line in lines)]))


def peaks_of(table: TaskTable, order: TaskOrder, chosen: np.ndarray) -> tuple[int, ...]:
    return simulate_order(table.with_recompute(chosen), order).peak_bytes


def is_within(table: TaskTable, peaks: tuple[int, ...]) -> bool:
    limits = table.graph.problem.memory_limit_bytes
    return all(peak <= limit for peak, limit in zip(peaks, limits, strict=True))


def brute_force_us(table: TaskTable, order: TaskOrder) -> float | None:
    """The earliest end over all choices that keep the limits."""
    found = []
    for counts in itertools.product(*(range(n + 1) for n in table.num_layers.tolist())):
        chosen = np.array(counts, dtype=np.int64)
        if is_within(table, peaks_of(table, order, chosen)):
            simulation = simulate_order(table.with_recompute(chosen), order)
            found.append(simulation.makespan_us)
    return min(found, default=None)


@pytest.mark.parametrize("make_order", [order_one_f_one_b, forwards_first])
@pytest.mark.parametrize("limits", [[90, 90], [61, 50], [44, 60], [40, 33], [24, 20], [9, 60]])
def test_the_memory_program_equals_brute_force(limits, make_order):
    table = uneven_table(limits)
    order = make_order(table)
    fitter = MemoryFitter(table, split_backward=False)
    start = fitter.fit(order)
    best_us = brute_force_us(table, order)
    if best_us is None:
        assert start is None
        return
    chosen = solve_memory_program(fitter, order, start, is_exact=True)
    assert is_within(table, peaks_of(table, order, chosen))
    assert fitter.run(order, chosen).makespan_us == pytest.approx(best_us, rel=1e-9)


def test_the_memory_program_beats_the_heuristic_somewhere():
    """Or the tests above would pass without a solver."""
    gains = []
    for limit in range(40, 200, 12):
        table = uneven_table([limit, limit], num_microbatches=6)
        order = forwards_first(table)
        fitter = MemoryFitter(table, split_backward=False)
        start = fitter.fit(order)
        if start is not None and start.any():
            chosen = solve_memory_program(fitter, order, start)
            before, after = fitter.run(order, start), fitter.run(order, chosen)
            gains.append(before.makespan_us - after.makespan_us)
    assert min(gains) >= 0
    assert max(gains) > 0


def test_a_large_program_ends_with_its_relaxation_and_still_gains():
    table = uneven_table([900, 900], num_microbatches=110)
    order = forwards_first(table)
    fitter = MemoryFitter(table, split_backward=False)
    assert num_program_rows(fitter) > 500
    start = fitter.fit(order)
    chosen = solve_memory_program(fitter, order, start)
    assert is_within(table, peaks_of(table, order, chosen))
    assert fitter.run(order, chosen).makespan_us < fitter.run(order, start).makespan_us


def test_the_solver_prints_nothing():
    # In a process of its own: it would print once.
    script = "from megatron_dip.planner.memory_program import _solver; _solver(1.0).run()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == ""


@given(case=cases(), split_backward=st.booleans(), part=st.floats(0.0, 1.0))
@settings(max_examples=150)
def test_the_heuristic_fits_an_order_wherever_recomputing_everything_does(
    case, split_backward, part
):
    problem, partition = case
    table = build_task_table(make_graph(problem, partition))
    order = order_one_f_one_b(table, split_backward=split_backward)
    everything = np.where(table.saved_layer_bytes > 0, table.num_layers, 0)
    most = np.array(simulate_order(table, order).peak_bytes)
    least = np.array(peaks_of(table, order, everything))
    limits = (least + (most - least) * part).astype(int).tolist()
    for shift in (0, -1):
        tight = problem.model_copy(
            update={"memory_limit_bytes": (max(0, limits[0] + shift), *limits[1:])}
        )
        tight_table = build_task_table(make_graph(tight, partition))
        fitter = MemoryFitter(tight_table, split_backward=split_backward)
        chosen = fitter.fit(order)
        assert (chosen is not None) == is_within(
            tight_table, peaks_of(tight_table, order, everything)
        )
        if chosen is None:
            continue
        assert is_within(tight_table, peaks_of(tight_table, order, chosen))
        for number in np.flatnonzero(chosen):
            stored = chosen.copy()
            stored[number] -= 1
            assert not is_within(tight_table, peaks_of(tight_table, order, stored))
        times = fitter.run(order, chosen)
        simulation = simulate_order(tight_table.with_recompute(chosen), order)
        assert times.makespan_us == simulation.makespan_us
        assert times.starts_us.tolist() == simulation.starts_us.tolist()


def test_slack_is_how_much_later_a_task_can_end():
    table = uneven_table([1000, 1000])
    order = order_one_f_one_b(table)
    fitter = MemoryFitter(table, split_backward=False)
    times = fitter.run(order, table.num_recomputed)
    slack_us = fitter.slack_us(order, table.num_recomputed)
    backward = table.num_works
    for number in range(table.num_works):
        longer = table.num_recomputed.copy()
        longer[number] = 1
        added_us = table.recompute_layer_us[number] - slack_us[backward + number]
        expected = times.makespan_us + max(0.0, added_us)
        assert fitter.run(order, longer).makespan_us == pytest.approx(expected)


@given(
    case=cases(),
    split_backward=st.booleans(),
    evaluations=st.sampled_from([None, 1, 60]),
    part=st.sampled_from([0.0, 0.3, 0.7]),
)
@settings(max_examples=60)
def test_plans_keep_any_limit_that_a_microbatch_keeps_by_itself(
    case, split_backward, evaluations, part
):
    problem, partition = case
    graph = make_graph(problem, partition)
    table = build_task_table(graph)
    least = MemoryFitter(table, split_backward=False).least_bytes(True)
    limits = least + ((np.array(tightest_limits(graph)) - least) * part).astype(int)
    tight = problem.model_copy(update={"memory_limit_bytes": tuple(limits.tolist())})
    options = {
        "evaluations": evaluations,
        "split_backward": split_backward,
        "max_tokens": {module.name: 1 for module in problem.modules},
    }
    plan = make_plan(tight, partition, **options)
    validate_plan(plan)
    simulation = simulate(plan)
    check_memory(plan, simulation.peak_bytes)
    assert simulation.estimate(plan.estimate.lower_bound_us) == plan.estimate
    assert pack_plan(plan, ()) == pack_plan(make_plan(tight, partition, **options), ())
    rank = int(np.argmax(least))
    assume(least[rank] > 0)
    limits = limits.tolist()
    limits[rank] = int(least[rank]) - 1
    impossible = problem.model_copy(update={"memory_limit_bytes": tuple(limits)})
    with pytest.raises(InfeasibleError, match="missing"):
        make_plan(impossible, partition, **options)


def test_recomputing_beats_holding_back():
    problem, partition = chain_case(4, 8, 10.0, memory_limit_bytes=[22] * 4)
    held_back = make_plan(problem, partition, memory_program=False, evaluations=100)
    recomputed = make_plan(problem, partition, evaluations=100)
    assert not held_back.recompute
    assert recomputed.recompute
    assert recomputed.estimate.makespan_us < 0.9 * held_back.estimate.makespan_us


def limited_search(
    limit: int = 110, num_microbatches: int = 12, evaluations: int = 400
) -> LocalSearch:
    table = uneven_table([limit] * 2, num_microbatches)
    evaluator = Evaluator(table, Budget(evaluations), split_backward=False, goal_us=0.0)
    return LocalSearch(evaluator, seed=1)


def test_what_works_wait_for_is_within_the_limits_as_it_is():
    search = limited_search()
    evaluator = search._evaluator
    assert evaluator.first_level_fits and len(evaluator.levels) > 1
    for rule, order in Portfolio(evaluator.table, evaluator.forwards).starts():
        point = Portfolio(evaluator.table, evaluator.forwards).point(rule, order)
        schedule = evaluator.evaluate(point)
        fit = evaluator.fitter.fit_and_run(schedule.order, schedule.starts_us)
        assert not fit.num_recomputed.any()
        assert fit.times.makespan_us == pytest.approx(schedule.makespan_us)
        assert fit.times.starts_us[evaluator.forwards.graph.exists] == pytest.approx(
            schedule.starts_us[evaluator.forwards.graph.exists]
        )


def test_a_level_that_admits_too_much_is_not_taken_as_it_is():
    search = limited_search(limit=45)
    assert not search._evaluator.first_level_fits and not search.can_hold_back
    assert search._current.num_recomputed.any()


def test_one_of_two_searches_waits_for_memory_until_that_is_clearly_worse():
    search = limited_search()
    assert search.can_hold_back
    evaluator = search._evaluator
    waiting = LocalSearch(evaluator, seed=2, holds_back=True)
    evaluator.allow(0.4)
    waiting.run()
    assert not waiting._current.num_recomputed.any()
    evaluator.allow(1.0)
    search.run()
    best_us = min(search.makespan_us, waiting.makespan_us)
    for one, other in ((search, waiting), (waiting, search)):
        one.go_on_from(other)
        assert one.makespan_us == best_us or one is waiting


@pytest.mark.parametrize(("limit", "num_turns"), [(110, 6), (62, 1)])
def test_a_search_that_waits_much_longer_than_recomputing_takes_is_given_up(
    limit, num_turns, monkeypatch
):
    turns, run = [], LocalSearch.run

    def counted_run(self):
        run(self)
        turns.append(self._holds_back)

    monkeypatch.setattr(LocalSearch, "run", counted_run)
    table = uneven_table([limit] * 2, 12)
    schedule = search_schedule(table, evaluations=400)
    assert sum(turns) == num_turns
    assert is_within(table, peaks_of(table, schedule.order, schedule.num_recomputed))


def test_rules_that_admit_the_same_are_tried_once():
    search = limited_search()
    evaluator = search._evaluator
    search._level = 0
    evaluator.allow(STARTS_SHARE)
    search.run()
    spent = evaluator.num_evaluations
    waiting = LocalSearch(evaluator, seed=2, holds_back=True)
    waiting.take_starts_of(search)
    assert evaluator.num_evaluations == spent + 1
    assert waiting._families.keys() == search._families.keys()
    assert next(waiting._starts, None) is None
    search._level = 1
    other = LocalSearch(evaluator, seed=3, holds_back=True)
    other.take_starts_of(search)
    assert next(other._starts, None) is not None


def test_without_a_limit_nothing_is_recomputed():
    assert not make_plan(*chain_case(4, 8), evaluations=50).recompute


@pytest.mark.parametrize("search", ["local", "mcts"])
def test_workers_share_evaluations_and_give_the_same_schedule_every_time(search):
    table = uneven_table([40, 40], num_microbatches=6)
    options = {"search": search, "evaluations": 200, "seed": 3}
    first = search_schedule(table, workers=3, **options)
    again = search_schedule(table, workers=3, **options)
    assert first.order.task.tolist() == again.order.task.tolist()
    assert first.num_recomputed.tolist() == again.num_recomputed.tolist()
    assert is_within(table, peaks_of(table, first.order, first.num_recomputed))


@pytest.mark.parametrize("workers", [0, -2])
def test_no_workers_are_refused(workers):
    with pytest.raises(ConfigError, match=f"{workers} workers"):
        search_schedule(uneven_table([90, 90]), evaluations=5, workers=workers)
    with pytest.raises(ConfigError, match=f"{workers} workers"):
        make_plan(*chain_case(2, 2), workers=workers)
