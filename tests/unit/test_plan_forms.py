"""Actions, plan files and the wire form: round trips, and errors that say what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import chain_case, encoder_case, make_item

from megatron_dip.errors import PlanDigestError, PlanError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import (
    Action,
    ActionType,
    load_plan,
    pack_plan,
    parse_plan,
    plan_digest,
    save_plan,
    unpack_plan,
)
from megatron_dip.planner import make_plan


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("3F12", Action(3, ActionType.FORWARD, 12)),
        ("3B12.1", Action(3, ActionType.BACKWARD, 12, 1)),
        ("3SEND_F12.1>4", Action(3, ActionType.SEND_FORWARD, 12, 1, 4)),
        ("4RECV_B12<5", Action(4, ActionType.RECV_BACKWARD, 12, 0, 5)),
        ("0REDUCE_GRAD", Action(0, ActionType.REDUCE_GRAD)),
    ],
)
def test_action_text_reads_back(text, action):
    assert Action.parse(text) == action
    assert str(action) == text


@pytest.mark.parametrize(
    "text",
    ["", "F0", "3X0", "3F", "3F0>1", "3SEND_F0", "3SEND_F0<4", "3RECV_F0>4", "3REDUCE_GRAD0"],
)
def test_text_that_is_no_action_is_refused(text):
    with pytest.raises(PlanError, match="not a pipeline action"):
        Action.parse(text)


@given(
    st.integers(0, 99),
    st.sampled_from(sorted(set(ActionType) - {ActionType.REDUCE_GRAD})),
    st.integers(0, 999),
    st.integers(0, 9),
    st.integers(0, 99),
)
def test_every_action_survives_its_text(stage, kind, microbatch, sub, peer):
    is_transfer = kind.is_send or kind.is_receive
    action = Action(stage, kind, microbatch, sub, peer if is_transfer else None)
    assert Action.parse(str(action)) == action


def test_a_plan_file_reads_back(tmp_path):
    plan = make_plan(*encoder_case())
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("name", ["problem", "partition"])
def test_a_plan_file_changed_after_planning_is_refused(name):
    data = make_plan(*encoder_case()).to_json()
    if name == "problem":
        data["problem"]["transfer"]["latency_us"] = 5.0
    else:
        data["partition"]["stages"][0]["num_layers"] = 2
        data["partition"]["stages"][1]["first_layer"] = 2
    with pytest.raises(PlanDigestError, match=f"{name}_digest is .* plan again"):
        parse_plan(data, "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("ranks"), "ranks: Field required"),
        (lambda data: data.update(version=2), "version"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data["ranks"][0]["actions"].append("0Q0"), "'0Q0'"),
    ],
)
def test_a_malformed_plan_file_names_the_field(change, message):
    data = json.loads(json.dumps(make_plan(*encoder_case()).to_json()))
    change(data)
    with pytest.raises(PlanError, match=message):
        parse_plan(data)


def test_a_packed_plan_is_refused_for_another_batch_or_partition():
    problem, partition = encoder_case()
    packed = pack_plan(make_plan(problem, partition))
    other = problem.model_copy(update={"microbatches": problem.microbatches[::-1]})
    with pytest.raises(PlanDigestError, match="all ranks of a pipeline must read the same data"):
        unpack_plan(packed, other, partition)
    uneven = partition_from_layers({"vision": [[2, 0]], "language": [[1, 1]]}, 2)
    with pytest.raises(PlanDigestError, match="same --dip-config"):
        unpack_plan(packed, problem, uneven)


def test_plan_digest_tells_plans_apart():
    case = encoder_case()
    packed = pack_plan(make_plan(*case))
    assert plan_digest(packed) == plan_digest(pack_plan(make_plan(*case)))
    assert plan_digest(packed) != plan_digest(pack_plan(make_plan(*case, split_backward=True)))


def test_costs_may_differ_between_ranks_that_read_the_same_batch():
    problem, partition = chain_case(1, 1)
    slower, _ = chain_case(1, 1, forward_us=9.0)
    assert unpack_plan(pack_plan(make_plan(problem, partition)), slower, partition)
    assert make_item()["forward_us"] != 9.0
