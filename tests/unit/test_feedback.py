"""Costs that follow what is measured: factors of stages, robust and bounded."""

import pytest
from planning_cases import chain_case, encoder_case

from megatron_dip.feedback import CostFeedback, measure_actions
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate
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
    feedback = CostFeedback(plan.partition)
    assert feedback.update(measure_actions(plan, durations(plan, slowness)).sums_us)
    assert feedback.factors[3] == pytest.approx((1.7, 1.7))
    assert feedback.factors[2] == pytest.approx((1.0, 1.0))
    corrected = planned(feedback.factors)
    measured = measure_actions(corrected, durations(plan, slowness))
    assert measured.error == pytest.approx(0.0, abs=1e-9)
    # Sums are against what items state, so that factors do not multiply up.
    assert not feedback.update(measured.sums_us)
    assert feedback.factors[3] == pytest.approx((1.7, 1.7))


def test_sums_of_ranks_add_up_to_those_of_all():
    plan = planned()
    whole = measure_actions(plan, durations(plan, {2: 1.3}))
    parts = [measure_actions(plan, durations(plan, {2: 1.3}, rank)) for rank in range(2)]
    assert sum(part.sums_us for part in parts) == pytest.approx(whole.sums_us)


def test_one_action_that_was_held_up_counts_little():
    problem, partition = chain_case(2, 9)
    plan = make_plan(problem, partition)
    times = durations(plan, {})
    times[0] = (times[0][0], times[0][1] * 1000)
    feedback = CostFeedback(plan.partition)
    feedback.update(measure_actions(plan, times).sums_us)
    assert max(max(factor) for factor in feedback.factors.values()) < 1.2


def test_one_slow_iteration_moves_nothing_and_a_lasting_change_is_followed():
    plan = planned()
    feedback = CostFeedback(plan.partition)

    def run(slowness):
        every = dict.fromkeys(range(4), slowness)
        feedback.update(measure_actions(plan, durations(plan, every)).sums_us)
        return feedback.factors[0].forward

    assert [run(1.0) for _ in range(5)] == pytest.approx([1.0] * 5)
    assert [run(3.0), run(1.0), run(1.0), run(1.0)] == pytest.approx([1.0] * 4)
    assert [run(3.0), run(3.0), run(3.0)][-1] == pytest.approx(3.0)


def test_the_first_iteration_is_forgotten_when_there_is_a_second():
    plan = planned()
    feedback = CostFeedback(plan.partition)
    for slowness in (50.0, 2.0):
        every = dict.fromkeys(range(4), slowness)
        feedback.update(measure_actions(plan, durations(plan, every)).sums_us)
    assert feedback.factors[0].forward == pytest.approx(2.0)


def test_a_stage_stays_within_reach_of_the_others_of_its_module():
    plan = planned()
    feedback = CostFeedback(plan.partition)
    feedback.update(measure_actions(plan, durations(plan, {3: 10_000.0})).sums_us)
    ratio = feedback.factors[3].forward / feedback.factors[2].forward
    assert 1.0 < ratio <= 16.0 + 1e-9


def test_a_stage_without_measurements_is_taken_to_be_like_its_module():
    plan = planned()
    feedback = CostFeedback(plan.partition)
    seen = [(action, us) for action, us in durations(plan, {2: 2.0}) if action.stage == 2]
    feedback.update(measure_actions(plan, seen).sums_us)
    assert feedback.factors[3] == pytest.approx((2.0, 2.0))
    assert feedback.factors[0] == (1.0, 1.0)


def test_small_changes_leave_costs_and_so_plans_as_they_are():
    plan = planned()
    feedback = CostFeedback(plan.partition)
    feedback.update(measure_actions(plan, durations(plan, {})).sums_us)
    before = feedback.factors
    every = dict.fromkeys(range(4), 1.02)
    assert not feedback.update(measure_actions(plan, durations(plan, every)).sums_us)
    assert feedback.factors is before


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
