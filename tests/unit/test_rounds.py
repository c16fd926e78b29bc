"""Planning in rounds: a plan at once, better ones later, and an end that can be relied on."""

from dataclasses import replace
from pathlib import Path

import pytest
from planning_cases import encoder_case

from megatron_dip.partition import Partition, cut_evenly, partition_from_layers
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import PlannerSettings, make_plan, pack_plan, plan_in_rounds
from megatron_dip.planner.messages import Failed, Forget, decode_frames, encode_frame
from megatron_dip.workload import Problem, load_problem

PROBLEMS = Path(__file__).resolve().parents[2] / "benchmarks" / "problems"


@pytest.fixture(scope="module")
def case() -> tuple[Problem, Partition]:
    """No order of it that is found reaches the lower bound."""
    problem = load_problem(PROBLEMS / "t2v-s-test-0.json")
    layers = {module.name: cut_evenly(module.num_layers, 1, 4) for module in problem.modules}
    return problem, partition_from_layers(layers, 4)


def settings(evaluations: int, algorithm: str = "dual_queue") -> PlannerSettings:
    return PlannerSettings(
        algorithm=algorithm,  # type: ignore[arg-type]
        evaluations=evaluations,
    )


def test_every_round_is_at_least_as_good_and_the_last_one_is_searched(case) -> None:
    rounds = list(plan_in_rounds(*case, settings(600), limit_ms=600_000))
    times = [one.plan.estimate.makespan_us for one in rounds]
    assert len(rounds) == 4, "the first plan, 64, 512 and 600 evaluations"
    assert times == sorted(times, reverse=True)
    assert [one.is_last for one in rounds] == [False] * 3 + [True]
    assert rounds[-1].is_searched and not rounds[0].is_searched
    for one in rounds:
        validate_plan(one.plan)


def test_the_same_batch_gives_the_same_plan_whatever_the_limit_if_it_is_kept(case) -> None:
    plans = [
        [pack_plan(one.plan, ()) for one in plan_in_rounds(*case, settings(128), limit_ms)]
        for limit_ms in (600_000.0, 1_200_000.0)
    ]
    assert plans[0] == plans[1]


def test_a_search_that_does_not_fit_ends_at_the_limit_and_says_so(case) -> None:
    """All evaluations would take days."""
    rounds = list(plan_in_rounds(*case, settings(10**9), limit_ms=200.0))
    assert rounds[-1].is_last and not rounds[-1].is_searched
    assert not any(one.is_last for one in rounds[:-1])


def test_without_time_there_is_the_first_plan(case) -> None:
    rounds = list(plan_in_rounds(*case, settings(64), limit_ms=0.0))
    first = make_plan(*case)
    assert {pack_plan(one.plan, ()) for one in rounds} == {pack_plan(first, ())}
    assert rounds[-1].is_last and not rounds[-1].is_searched


def test_a_plan_that_cannot_be_improved_is_the_last() -> None:
    problem, partition = encoder_case()
    *_, last = plan_in_rounds(problem, partition, settings(10**9), limit_ms=600_000.0)
    assert last.is_searched
    assert last.plan.estimate is not None
    assert last.plan.estimate.makespan_us == last.plan.estimate.lower_bound_us


@pytest.mark.parametrize(("evaluations", "algorithm"), [(0, "dual_queue"), (64, "one_f_one_b")])
def test_where_there_is_nothing_to_search_the_first_plan_is_the_last(
    case, evaluations: int, algorithm: str
) -> None:
    (only,) = plan_in_rounds(*case, settings(evaluations, algorithm), limit_ms=1000.0)
    assert only.is_last and only.is_searched


def test_frames_come_out_whole_however_they_arrive() -> None:
    messages = [Forget(number=3), Failed(number=4, reason="x" * 1000), Forget(number=5)]
    sent = b"".join(map(encode_frame, messages))
    received, found = bytearray(), []
    for start in range(0, len(sent), 7):
        received += sent[start : start + 7]
        found += decode_frames(received)
    assert found == messages and not received


def test_microbatches_are_split_in_turn_where_sizes_are_to_be_measured() -> None:
    problem, partition = encoder_case()
    first = problem.microbatches[0]
    images = tuple(first["vision"][0].model_copy(update={"item": n}) for n in range(4))
    batch = {
        "vision": images,
        "language": (first["language"][0].model_copy(update={"needs": None}),),
    }
    problem = problem.model_copy(update={"microbatches": (batch,) * 4})
    varied = replace(settings(0), varied=("vision",)).first_plan(problem, partition)
    counts = [len(varied.graph.subs("vision", number)) for number in range(4)]
    assert counts == [1, 2, 4, 1]
    validate_plan(varied)
