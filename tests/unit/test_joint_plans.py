"""Several batches planned together: their joint problem, and its plan restricted to each."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, encoder_case, make_item

from megatron_dip.config import ScheduleConfig
from megatron_dip.errors import PlanError
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Action, Plan, save_plan
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import (
    PlannerSettings,
    joint_problem,
    load_joint_plan,
    make_plan,
    plan_in_rounds,
    restrict_plan,
)
from megatron_dip.simulator import simulate
from megatron_dip.workload import Problem, parse_problem


@st.composite
def replicas(draw: st.DrawFn) -> tuple[list[Problem], Partition]:
    """A batch, and others in which modules but the last lack items that it has."""
    problem, partition = draw(cases())
    batches = [problem]
    for _ in range(draw(st.integers(1, 2))):
        data = problem.model_dump(mode="json")
        for microbatch in data["microbatches"]:
            for name in list(microbatch)[:-1]:
                microbatch[name] = [i for i in microbatch[name] if draw(st.booleans())]
            for items in microbatch.values():
                for item in items:
                    item["forward_us"] = draw(st.sampled_from([0.0, 1.0, 5.0]))
                    item["activation_bytes"] = draw(st.integers(0, 9))
                    for upstream, needed in (item["needs"] or {}).items():
                        present = {other["item"] for other in microbatch.get(upstream, ())}
                        item["needs"][upstream] = [one for one in needed if one in present]
        batches.append(parse_problem(data))
    return batches, partition


def actions_of(plan: Plan, rank: int, module: str) -> list[Action]:
    return [
        action
        for action in plan.actions[rank]
        if action.type.is_compute and plan.partition[action.stage].module == module
    ]


@settings(max_examples=40)
@given(replicas(), st.sampled_from([None, 1, 2]), st.booleans())
def test_a_joint_plan_holds_for_every_batch_in_one_order_and_within_its_bounds(
    case: tuple[list[Problem], Partition], max_tokens: int | None, limited: bool
) -> None:
    batches, partition = case
    limits = {module.name: max_tokens for module in batches[0].modules}
    joint = joint_problem(batches)
    if limited:
        peak = make_plan(joint, partition, max_tokens=limits).estimate.peak_bytes
        tight = {"memory_limit_bytes": tuple(max(1, int(0.7 * one)) for one in peak)}
        joint = joint_problem([batch.model_copy(update=tight) for batch in batches])
    plan = make_plan(joint, partition, max_tokens=limits, when_infeasible="least_memory")
    last = joint.module_order[-1]
    for batch in batches:
        own = restrict_plan(plan, batch)
        validate_plan(own)
        assert own.problem is batch and own.estimate is not None
        assert own.estimate.makespan_us <= plan.estimate.makespan_us * (1 + 1e-9)
        assert own.estimate.makespan_us == simulate(own).makespan_us
        for mine, bound in zip(own.estimate.peak_bytes, plan.estimate.peak_bytes, strict=True):
            assert mine <= bound
        for rank in range(joint.num_ranks):
            assert actions_of(own, rank, last) == actions_of(plan, rank, last)
            kept = set(own.actions[rank])
            assert [a for a in plan.actions[rank] if a in kept] == list(own.actions[rank])


def test_the_joint_problem_has_the_most_of_every_item_and_all_that_is_read() -> None:
    small, _ = encoder_case()
    data = small.model_dump(mode="json")
    images = [
        make_item(4, tokens=2, activation_bytes=5),
        make_item(7, 3.0, tokens=9, boundary_bytes=6),
    ]
    data["microbatches"][0]["vision"] = images
    data["microbatches"][0]["language"][0]["needs"] = {"vision": [7]}
    data["microbatches"][1]["vision"] = [make_item(0)]
    data["microbatches"][1]["language"] = [make_item(0, 1.0, needs={"vision": []})]
    other = parse_problem(data)
    first, second = joint_problem([other, small]).microbatches
    # The largest images of both batches are one, whatever their numbers.
    assert [item.item for item in first["vision"]] == [0, 1]
    assert [item.tokens for item in first["vision"]] == [9, 2]
    assert [item.forward_us for item in first["vision"]] == [3.0, 1.0]
    assert [item.boundary_bytes for item in first["vision"]] == [6, 4]
    assert [item.activation_bytes for item in first["vision"]] == [10, 10]
    assert first["language"][0].needs == {"vision": (0, 1)}
    assert [item.item for item in second["vision"]] == [0]
    assert second["language"][0].needs == {"vision": ()}
    assert second["language"][0].forward_us == 2.0
    (alone, _) = joint_problem([other]).microbatches
    assert alone["language"][0].needs == {"vision": (0,)}
    assert "vision" not in joint_problem([small]).microbatches[1]


def test_what_a_batch_lacks_is_dropped_with_its_messages() -> None:
    problem, partition = encoder_case()
    plan = make_plan(joint_problem([problem]), partition, max_tokens={"vision": 1})
    data = problem.model_dump(mode="json")
    data["microbatches"][0]["vision"] = data["microbatches"][0]["vision"][1:]
    own = restrict_plan(plan, parse_problem(data))
    assert own.sub_microbatches[0] == ("vision", 0, 0, (1,))
    assert "0F0.1" in plan.to_text() and ".1" not in own.to_text()
    assert "0SEND_F0>1" in own.to_text()
    # Nobody reads the image: it is computed, and handed to no one.
    data["microbatches"][0]["language"][0]["needs"] = {"vision": []}
    unread = restrict_plan(plan, parse_problem(data)).to_text()
    assert "1F0" in unread and "2RECV_F0" not in unread
    data["microbatches"][0]["vision"] = []
    assert "1F0" not in restrict_plan(plan, parse_problem(data)).to_text()


def test_a_larger_batch_and_one_that_reads_more_are_refused() -> None:
    problem, partition = encoder_case()
    text_only = problem.model_copy(update={"microbatches": problem.microbatches[1:] * 2})
    plan = make_plan(joint_problem([text_only]), partition)
    with pytest.raises(PlanError, match=r"no place for items \[0, 1\] of vision in microbatch 0"):
        restrict_plan(plan, problem)
    shorter = problem.model_copy(update={"microbatches": problem.microbatches[1:]})
    with pytest.raises(PlanError, match="num_microbatches of batch 1 is 1, of batch 0 2"):
        joint_problem([problem, shorter])
    data = problem.model_dump(mode="json")
    data["microbatches"][0]["language"][0]["needs"] = {"vision": []}
    unread = make_plan(joint_problem([parse_problem(data)]), partition)
    with pytest.raises(PlanError):
        restrict_plan(unread, problem)


def test_a_plan_file_serves_every_batch_that_it_was_made_for(tmp_path: Path) -> None:
    small, partition = encoder_case()
    large = small.model_copy(update={"microbatches": small.microbatches[:1] * 2})
    save_plan(make_plan(joint_problem([small, large]), partition), tmp_path / "all.json")
    fixed = load_joint_plan(tmp_path / "all.json", partition)
    settings = PlannerSettings(algorithm="dual_queue", evaluations=64, fixed=fixed)
    for problem in (small, large):
        (found,) = plan_in_rounds(problem, partition, settings, limit_ms=0.0)
        assert found.is_last and found.is_searched
        assert found.plan.actions == restrict_plan(fixed, problem).actions
        assert found.plan.problem is problem


def test_a_plan_file_of_another_cut_or_of_one_batch_is_refused(tmp_path: Path) -> None:
    problem, partition = encoder_case()
    other = partition_from_layers({"vision": [[2, 0]], "language": [[1, 1]]}, 2)
    save_plan(make_plan(joint_problem([problem]), partition), tmp_path / "all.json")
    with pytest.raises(PlanError, match=r"all\.json: was made on another partition"):
        load_joint_plan(tmp_path / "all.json", other)
    split = partition.model_copy(update={"sub_microbatch_tokens": {"vision": 1}})
    with pytest.raises(PlanError, match=r"vision are split .* at None tokens, and not at 1"):
        load_joint_plan(tmp_path / "all.json", split)
    save_plan(make_plan(joint_problem([problem]), split), tmp_path / "split.json")
    for same in (split, partition):
        assert len(load_joint_plan(tmp_path / "split.json", same).graph.subs("vision", 0)) == 2
    data = problem.model_dump(mode="json")
    data["microbatches"][0]["vision"][0]["item"] = 7
    save_plan(make_plan(parse_problem(data), partition), tmp_path / "one.json")
    with pytest.raises(PlanError, match=r"is the plan of one batch .*more than one --problem"):
        load_joint_plan(tmp_path / "one.json", partition)


def test_a_plan_beside_what_makes_plans_is_refused() -> None:
    with pytest.raises(ValueError, match=r"states \['evaluations'\] beside plan"):
        ScheduleConfig(num_ranks=2, plan=Path("all.json"), evaluations=9)
