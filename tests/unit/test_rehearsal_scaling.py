"""The plan that is rehearsed: times and bytes of a plan, scaled."""

import math

import pytest
from planning_cases import chain_case

from megatron_dip.errors import ConfigError
from megatron_dip.planner import make_plan
from megatron_dip.rehearsal import scale_plan
from megatron_dip.simulator import simulate


def case():
    problem, partition = chain_case(2, 4, forward_us=3.0, overhead_us=1.0, bytes_per_us=100.0)
    return make_plan(problem, partition)


def test_times_and_bytes_are_scaled_apart_and_the_schedule_stays():
    plan = case()
    scaled = scale_plan(plan, time_scale=10.0, transfer_scale=10.0)
    assert scaled.actions == plan.actions
    before = [timed.end_us - timed.start_us for timed in simulate(plan).timelines[0]]
    after = [timed.end_us - timed.start_us for timed in simulate(scaled).timelines[0]]
    assert after == pytest.approx([10.0 * time for time in before])
    item = scaled.problem.items("language", 0)[0]
    assert item.boundary_bytes == 40
    assert item.tokens * 4 == item.boundary_bytes


def test_even_the_smallest_transfer_moves_one_value():
    item = scale_plan(case(), 1.0, 1e-9).problem.items("language", 0)[0]
    assert (item.tokens, item.boundary_bytes) == (1, 4)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_above_zero_is_refused(scale):
    with pytest.raises(ConfigError, match="--time-scale"):
        scale_plan(case(), scale, 1.0)
