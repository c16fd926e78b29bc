"""Costs that follow what is measured: factors of stages, robust and bounded."""

import pytest
from planning_cases import MODULE_GRAPHS, chain_case, encoder_case, make_item, make_problem

from megatron_dip.costs import work_costs
from megatron_dip.plan import ActionType
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate
from megatron_dip.simulator.measured import CostFeedback, measure_actions, stated_overheads
from megatron_dip.workload import Problem, StageFactor, parse_problem


def planned(factors=None):
    problem, partition = encoder_case()
    given = None if factors is None else {n: StageFactor(*pair) for n, pair in factors.items()}
    return make_plan(problem.model_copy(update={"stage_factors": given}), partition)


def durations(plan, slowness, rank=None):
    """What actions take where those of a stage take ``slowness[stage]`` as long as stated."""
    return [
        (timed.action, (timed.end_us - timed.start_us) * slowness.get(timed.action.stage, 1.0))
        for line_rank, line in enumerate(simulate(plan).timelines)
        for timed in line
        if rank in (None, line_rank)
    ]


def test_factors_multiply_the_times_of_their_stage_alone():
    plain, slowed = planned(), planned({1: (3.0, 5.0)})
    before = {t.action: t.end_us - t.start_us for line in simulate(plain).timelines for t in line}
    after = {t.action: t.end_us - t.start_us for line in simulate(slowed).timelines for t in line}
    for action, time_us in before.items():
        expected = {"F": 3.0, "B": 5.0}[action.type.value] if action.stage == 1 else 1.0
        assert after[action] == pytest.approx(expected * time_us)


def test_a_slow_rank_is_found_and_predicted():
    plan = planned()
    slowness = {1: 1.7, 3: 1.7}
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    assert feedback.update(measure_actions(plan, durations(plan, slowness)).sums)
    assert feedback.factors[3] == pytest.approx((1.7, 1.7))
    assert feedback.factors[2] == pytest.approx((1.0, 1.0))
    corrected = planned(feedback.factors)
    measured = measure_actions(corrected, durations(plan, slowness))
    assert measured.error == pytest.approx(0.0, abs=1e-9)
    # Sums are against what items state, so that factors do not multiply up.
    assert not feedback.update(measured.sums)
    assert feedback.factors[3] == pytest.approx((1.7, 1.7))


def test_sums_of_ranks_add_up_to_those_of_all():
    plan = planned()
    whole = measure_actions(plan, durations(plan, {2: 1.3}))
    parts = [measure_actions(plan, durations(plan, {2: 1.3}, rank)) for rank in range(2)]
    assert sum(part.sums for part in parts) == pytest.approx(whole.sums)


def test_one_action_that_was_held_up_counts_little():
    problem, partition = chain_case(2, 9)
    plan = make_plan(problem, partition)
    times = durations(plan, {})
    times[0] = (times[0][0], times[0][1] * 1000)
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    feedback.update(measure_actions(plan, times).sums)
    assert max(max(factor) for factor in feedback.factors.values()) < 1.2


def test_one_slow_iteration_moves_nothing_and_a_lasting_change_is_followed():
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))

    def run(slowness):
        every = dict.fromkeys(range(4), slowness)
        feedback.update(measure_actions(plan, durations(plan, every)).sums)
        return feedback.factors[0].forward

    assert [run(1.0) for _ in range(5)] == pytest.approx([1.0] * 5)
    assert [run(3.0), run(1.0), run(1.0), run(1.0)] == pytest.approx([1.0] * 4)
    assert [run(3.0), run(3.0), run(3.0)][-1] == pytest.approx(3.0)


def test_the_first_iteration_is_forgotten_when_there_is_a_second():
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    for slowness in (50.0, 2.0):
        every = dict.fromkeys(range(4), slowness)
        feedback.update(measure_actions(plan, durations(plan, every)).sums)
    assert feedback.factors[0].forward == pytest.approx(2.0)


def test_a_stage_stays_within_reach_of_the_others_of_its_module():
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    feedback.update(measure_actions(plan, durations(plan, {3: 10_000.0})).sums)
    ratio = feedback.factors[3].forward / feedback.factors[2].forward
    assert 1.0 < ratio <= 16.0 + 1e-9


@pytest.mark.parametrize("slowness", [1e7, 1e20, 1e-20])
def test_costs_that_are_far_off_still_make_a_problem(slowness):
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    every = dict.fromkeys(range(len(plan.partition.stages)), slowness)
    assert feedback.update(measure_actions(plan, durations(plan, every)).sums)
    problem = planned(feedback.factors).problem
    factor = parse_problem(problem.model_dump(mode="json")).stage_factors[0].forward
    assert factor == pytest.approx(min(max(slowness, 1e-12), 1e12))


def test_a_stage_without_measurements_is_taken_to_be_like_its_module():
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    seen = [(action, us) for action, us in durations(plan, {2: 2.0}) if action.stage == 2]
    feedback.update(measure_actions(plan, seen).sums)
    assert feedback.factors[3] == pytest.approx((2.0, 2.0))
    assert feedback.factors[0] == (1.0, 1.0)


def test_small_changes_leave_costs_and_so_plans_as_they_are():
    plan = planned()
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    feedback.update(measure_actions(plan, durations(plan, {})).sums)
    before = feedback.factors
    every = dict.fromkeys(range(4), 1.02)
    assert not feedback.update(measure_actions(plan, durations(plan, every)).sums)
    assert feedback.factors is before


def uneven_plan(overhead_us, factors=None):
    """Two ranks, one layer each, ten microbatches of 100, 200, ... 1000 us of work."""
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 2},
        [{"language": [make_item(0, 100.0 * (n + 1))]} for n in range(10)],
        num_ranks=2,
        overhead_us=overhead_us,
    )
    _, partition = chain_case(2, 1)
    return make_plan(problem.model_copy(update={"stage_factors": factors}), partition)


def run_with_overhead(plan, slowness, overhead_us):
    """What actions take where work takes ``slowness`` as long as stated, layers ``overhead_us``."""
    costs = work_costs(plan.graph)
    stated_us = plan.problem.modules[0].layer_overhead_us
    factors = plan.problem.stage_factors or {}
    found = []
    for work, number in plan.graph.numbers.items():
        factor = factors.get(work.stage, StageFactor())
        backward_us = costs.input_grad_us[number] + costs.weight_grad_us[number]
        for phase, us in enumerate((costs.forward_us[number], backward_us)):
            kind = (ActionType.FORWARD, ActionType.BACKWARD)[phase]
            found.append(
                (work.action(kind), slowness * (us / factor[phase] - stated_us) + overhead_us)
            )
    return found


def test_what_a_layer_takes_by_itself_is_told_from_its_work():
    plan = uneven_plan(20.0)
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    for _ in range(3):
        measured = measure_actions(plan, run_with_overhead(plan, 2.0, 600.0))
        feedback.update(measured.sums)
        corrections = feedback.corrections
        plan = uneven_plan(corrections.overheads_us["language"], corrections.factors)
    # In the unit of the work that the factor multiplies.
    assert corrections.overheads_us["language"] == pytest.approx(300.0, rel=0.3)
    for _ in range(6):
        measured = measure_actions(plan, run_with_overhead(plan, 2.0, 600.0))
        feedback.update(measured.sums)
        corrections = feedback.corrections
        plan = uneven_plan(corrections.overheads_us["language"], corrections.factors)
    assert measured.error < 0.03
    assert corrections.factors[0].forward == pytest.approx(2.0, rel=0.1)


def test_actions_of_one_size_say_nothing_of_overheads():
    problem, partition = chain_case(2, 12, 500.0, overhead_us=20.0)
    plan = make_plan(problem, partition)
    feedback = CostFeedback(plan.partition, stated_overheads(plan))
    for _ in range(4):
        feedback.update(measure_actions(plan, run_with_overhead(plan, 1.0, 400.0)).sums)
    assert feedback.corrections.overheads_us == {"language": 20.0}
    assert feedback.factors[0].forward == pytest.approx(900.0 / 520.0)


def test_factors_travel_in_the_problem_and_count_in_its_digest_only_if_there_are_any():
    problem, _ = encoder_case()
    slowed = Problem.model_validate(problem.model_dump() | {"stage_factors": {1: (1.5, 2.0)}})
    again = parse_problem(slowed.model_dump(mode="json"))
    assert again == slowed and again.stage_factors[1] == StageFactor(1.5, 2.0)
    assert slowed.digest() != problem.digest()
    # As computed before there were factors.
    old = problem.model_dump(mode="json")
    del old["stage_factors"]
    assert parse_problem(old).digest() == problem.digest()
