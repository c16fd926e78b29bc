"""Actions, plan files and the wire form: round trips, and errors that say what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import encoder_case, sizes_of

from megatron_dip.costs import BatchSizes, ItemSize
from megatron_dip.errors import PlanDigestError, PlanError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import (
    Action,
    ActionType,
    load_plan,
    parse_plan,
    save_plan,
)
from megatron_dip.planner import joint_problem, make_plan, pack_plan, plan_digest, unpack_plan


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


SIZES: BatchSizes = (
    {
        "vision": [ItemSize(tokens=8, spans=(8,), output_tokens=2), ItemSize(tokens=4, spans=(4,))],
        "language": [
            ItemSize(
                tokens=5, spans=(3, 2), context_tokens=7, needs={"vision": (1,)}, loss_tokens=4
            )
        ],
    },
    {"vision": [], "language": [ItemSize(tokens=6, spans=(6,), loss_tokens=6)]},
)
"""Of the items of ``encoder_case``."""


def test_a_rank_without_data_gets_the_sizes_with_the_plan():
    problem, partition = encoder_case()
    asked = []

    def build(sizes):
        asked.append(sizes)
        return problem

    plan = make_plan(problem, partition)
    planned = unpack_plan(pack_plan(plan, [SIZES]), build, partition)
    assert planned.plan == plan and asked == [planned.sizes]
    assert [{n: list(items) for n, items in m.items()} for m in planned.sizes] == list(SIZES)
    assert planned.num_loss_tokens("language", 0) == 4


def test_a_packed_plan_is_refused_for_another_batch_or_partition():
    problem, partition = encoder_case()
    packed = pack_plan(make_plan(problem, partition), [SIZES])
    with pytest.raises(PlanDigestError, match="all ranks of a pipeline must read the same data"):
        unpack_plan(packed, lambda _: problem, partition, own=SIZES[::-1])
    uneven = partition_from_layers({"vision": [[2, 0]], "language": [[1, 1]]}, 2)
    with pytest.raises(PlanDigestError, match="same --dip-config"):
        unpack_plan(packed, lambda _: problem, uneven, own=SIZES)


def test_every_replica_gets_its_own_part_of_a_plan_that_several_share():
    problem, partition = encoder_case()
    other = problem.model_copy(update={"microbatches": problem.microbatches[1:] * 2})
    problems, replicas = [problem, other], [SIZES, SIZES[1:] * 2]
    packed = pack_plan(make_plan(joint_problem(problems), partition), replicas)
    for number, (expected, sizes) in enumerate(zip(problems, replicas, strict=True)):
        for own in (sizes, None):
            planned = unpack_plan(
                packed, lambda _, made=expected: made, partition, replica=number, own=own
            )
            assert planned.plan.problem is expected and len(planned.sizes) == len(sizes)
            num_images = [len(microbatch["vision"]) for microbatch in planned.sizes]
            assert num_images == [len(microbatch["vision"]) for microbatch in sizes]
            assert ("0F0" in planned.plan.to_text().split()) == (num_images[0] > 0)


def test_plan_digest_tells_plans_apart():
    problem, partition = encoder_case()
    sizes = [sizes_of(problem)]
    packed = pack_plan(make_plan(problem, partition), sizes)
    assert plan_digest(packed) == plan_digest(pack_plan(make_plan(problem, partition), sizes))
    split = make_plan(problem, partition, split_backward=True)
    assert plan_digest(packed) != plan_digest(pack_plan(split, sizes))
