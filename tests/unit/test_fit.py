"""Times of layers, fitted to what recorded actions took."""

from dataclasses import replace
from itertools import product
from random import Random

import pytest
from machine_cases import PARTITION, Machine, batch, builder

from megatron_dip.costs.devices import device_preset
from megatron_dip.errors import DataError
from megatron_dip.planner import make_plan
from megatron_dip.report.fit import fit_times, restated
from megatron_dip.report.traces import IterationTrace, RankTrace, Span

STATED = builder(replace(device_preset("H100"), layer_overhead_us=60.0))


def trace(plan, durations):
    """The actions of every rank one after another, without waiting."""
    ranks = []
    for rank in range(2):
        spans, now_us = [], 0.0
        for action, us in durations:
            if PARTITION[action.stage].rank == rank:
                spans.append(Span(str(action), now_us, now_us + us, False))
                now_us += us
        ranks.append(RankTrace(rank=rank, start_us=0.0, end_us=now_us, spans=tuple(spans)))
    return IterationTrace(schedule="dip", iteration=1, ranks=tuple(ranks))


def recorded(machine, num_steps=6, change=lambda durations: durations):
    """Steps whose microbatches are split every other time."""
    random, found = Random(5), []
    for number in range(num_steps):
        sizes = batch(random)
        limits = {"vision": 256} if number % 2 else None
        plan = make_plan(STATED.build(sizes), PARTITION, max_tokens=limits)
        found.append((trace(plan, change(machine.run(plan, sizes))), plan))
    return found, sizes


@pytest.fixture(scope="module")
def steps():
    return recorded(Machine(slowness=(1.0, 1.0), gradient=1.0))


def assert_true_times(found, sizes, machine, *, within):
    """Per item: of a layer, and of the head, which is as long as several layers."""
    made = restated(STATED.build(sizes), found)
    true = machine.problems.build(sizes)
    for name, phases in (
        ("vision", ("forward_us", "input_grad_us")),
        ("language", ("forward_us", "input_grad_us", "last_extra_forward_us")),
    ):
        for number in range(made.num_microbatches):
            pairs = zip(made.items(name, number), true.items(name, number), strict=True)
            for (ours, theirs), phase in product(pairs, phases):
                given, expected = getattr(ours, phase), getattr(theirs, phase)
                assert given == pytest.approx(expected, rel=within), (name, phase)


def test_the_times_of_a_machine_are_found(steps):
    found = fit_times(steps[0])
    assert found["language"].error < 0.01 and found["vision"].error < 0.01
    overhead_us = found["language"].times.overhead_us
    assert overhead_us == pytest.approx(250.0, rel=0.05)
    assert_true_times(found, steps[1], Machine(), within=0.05)


def test_actions_that_were_held_up_change_nothing(steps):
    random = Random(1)

    def hold_up(durations):
        return [(action, us * (8.0 if random.random() < 0.1 else 1.0)) for action, us in durations]

    held_up, sizes = recorded(Machine(slowness=(1.0, 1.0), gradient=1.0), change=hold_up)
    assert_true_times(fit_times(held_up), sizes, Machine(), within=0.1)


def test_problems_at_fitted_times_say_nothing_of_stages(steps):
    problem = STATED.build(steps[1]).model_copy(update={"stage_factors": {0: (2.0, 2.0)}})
    made = restated(problem, fit_times(steps[0]))
    assert made.stage_factors is None
    assert made.module("vision").layer_overhead_us != problem.module("vision").layer_overhead_us


def test_phases_that_an_item_has_no_part_in_stay_without_time(steps):
    problem = STATED.build(steps[1])
    frozen = problem.items("vision", 0)[0].model_copy(update={"weight_grad_us": 0.0})
    batch_of_one = {"vision": (frozen,), "language": problem.items("language", 0)}
    made = restated(
        problem.model_copy(update={"microbatches": (batch_of_one,)}), fit_times(steps[0])
    )
    found = made.items("vision", 0)[0]
    assert (found.weight_grad_us, found.first_extra_input_grad_us) == (0.0, 0.0)
    assert found.input_grad_us > 0.0


def test_a_run_of_one_size_is_predicted_as_it_was():
    machine = Machine(slowness=(1.0, 1.0), gradient=1.0)
    sizes = [batch(Random(3))[0]] * 4
    plan = make_plan(STATED.build(sizes), PARTITION)
    durations = machine.run(plan, sizes)
    found = fit_times([(trace(plan, durations), plan)])
    again = make_plan(restated(STATED.build(sizes), found), PARTITION)
    assert again.estimate.makespan_us == pytest.approx(
        make_plan(machine.problems.build(sizes), PARTITION).estimate.makespan_us, rel=0.05
    )


def test_plans_of_earlier_versions_are_refused(steps):
    trace_of, plan = steps[0][0]
    old = plan.problem.model_copy(
        update={
            "microbatches": tuple(
                {
                    name: tuple(item.model_copy(update={"token_pairs": None}) for item in items)
                    for name, items in batch.items()
                }
                for batch in plan.problem.microbatches
            )
        }
    )
    with pytest.raises(DataError, match="an earlier version wrote them"):
        fit_times([(trace_of, replace(plan, problem=old))])
    with pytest.raises(DataError, match="no recorded step has a plan"):
        fit_times([])
