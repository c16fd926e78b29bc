"""The validator: a good plan passes, and every way of spoiling it is found."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, chain_case, encoder_case

from megatron_dip.errors import PlanDeadlockError, PlanError, PlanMemoryError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Action, Plan, Recompute, parse_actions
from megatron_dip.plan.validation import check_memory, validate_plan
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate


def with_lines(plan: Plan, lines: list[list[str]]) -> Plan:
    actions = tuple(parse_actions(" ".join(line)) for line in lines)
    return dataclasses.replace(plan, actions=actions)


def lines_of(plan: Plan) -> list[list[str]]:
    return [line.split() for line in plan.to_text().splitlines()]


@pytest.fixture
def plan() -> Plan:
    return make_plan(*encoder_case(), max_tokens={"vision": 1})


def swap(line: list[str], first: str, second: str) -> None:
    i, j = line.index(first), line.index(second)
    line[i], line[j] = line[j], line[i]


def move(line: list[str], word: str, before: str | None) -> None:
    line.remove(word)
    line.insert(len(line) if before is None else line.index(before), word)


MUTATIONS = {
    "two receives swapped": (
        lambda r: swap(r[1], "1RECV_F0<0", "1RECV_F0.1<0"),
        "1RECV_F0<0 comes after 1F0",
    ),
    "send dropped": (lambda r: r[0].remove("0SEND_F0>1"), "0SEND_F0>1 is missing from rank 0"),
    "receive dropped": (lambda r: r[1].remove("1RECV_F0<0"), "1RECV_F0<0 is missing from rank 1"),
    "compute dropped": (lambda r: r[1].remove("3B1"), "3B1 is missing from rank 1"),
    "compute on the wrong rank": (
        lambda r: (r[0].remove("0B0"), r[1].append("0B0")),
        "0B0 belongs to rank 0",
    ),
    "compute twice": (lambda r: r[0].insert(0, "0F0"), "0F0 comes twice"),
    "unknown microbatch": (lambda r: r[0].insert(0, "0F7"), "0F7 is not part of the batch"),
    "unknown stage": (lambda r: r[0].insert(0, "9F0"), "stage that does not exist"),
    "both kinds of backward": (lambda r: r[0].append("0W0"), "0W0 is not part of the batch"),
    "wrong peer": (
        lambda r: r[0].__setitem__(r[0].index("0SEND_F0>1"), "0SEND_F0>3"),
        "0SEND_F0>1 is missing",
    ),
    "message nobody needs": (
        lambda r: (r[0].append("0SEND_F1>1"), r[1].append("1RECV_F1<0")),
        "0SEND_F1>1 moves nothing",
    ),
    "backward before forward": (
        lambda r: move(r[1], "3B1", "3F1"),
        "3B1 comes before 3F1",
    ),
    "send before compute": (
        lambda r: move(r[0], "0SEND_F0>1", "0F0"),
        "0SEND_F0>1 comes before 0F0",
    ),
    "receive after its reader": (
        lambda r: move(r[1], "1RECV_F0<0", None),
        "1RECV_F0<0 comes after 1F0",
    ),
    "gradient sent before it is made": (
        lambda r: move(r[1], "3SEND_B1>2", "3B1"),
        "3SEND_B1>2 comes before 3B1, which it needs",
    ),
    "gradient received after its reader": (
        lambda r: move(r[0], "2RECV_B1<3", None),
        "2RECV_B1<3 comes after 2B1, which reads it",
    ),
    "reduce too early": (
        lambda r: move(r[0], "2REDUCE_GRAD", r[0][0]),
        "comes after 2REDUCE_GRAD",
    ),
    "reduce missing": (lambda r: r[0].remove("2REDUCE_GRAD"), r"stages \[0\] \(expected \[2, 0\]"),
    "reduce out of order": (
        lambda r: move(r[1], "3REDUCE_GRAD", None),
        r"stages \[1, 3\] \(expected \[3, 1\]",
    ),
    "reduce of a foreign rank": (lambda r: r[0].append("3REDUCE_GRAD"), "belongs to rank 1"),
    "number too large": (lambda r: r[0].insert(0, f"0F{2**64}"), "beyond 64 bits"),
    "reduce twice": (lambda r: r[0].append("0REDUCE_GRAD"), "0REDUCE_GRAD comes twice"),
    "rank missing": (lambda r: r.pop(), r"1 ranks \(expected 2\)"),
}


def test_a_good_plan_passes(plan):
    validate_plan(plan)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_spoiled_plan_is_refused(plan, name):
    mutate, message = MUTATIONS[name]
    lines = lines_of(plan)
    mutate(lines)
    with pytest.raises(PlanError, match=message):
        validate_plan(with_lines(plan, lines))


def test_channel_orders_that_differ_are_reported_with_both_sides():
    plan = make_plan(*chain_case(2, 2))
    lines = lines_of(plan)
    # Rank 1 takes microbatch 1 first; all of its readers still come after it.
    lines[1] = ["1RECV_F1<0", "1RECV_F0<0", *(w for w in lines[1] if "RECV_F" not in w)]
    with pytest.raises(PlanError, match="rank 0 posts 0SEND_F0>1, rank 1 posts 1RECV_F1<0"):
        validate_plan(with_lines(plan, lines))


def test_receive_before_its_send_is_reported_with_blocked_heads():
    plan = make_plan(*chain_case(2, 1))
    lines = lines_of(plan)
    lines[0].remove("0RECV_B0<1")
    lines[0].insert(0, "0RECV_B0<1")
    with pytest.raises(PlanDeadlockError, match="rank 0: 0RECV_B0<1, rank 1: 1RECV_F0<0"):
        validate_plan(with_lines(plan, lines))


def test_two_sends_that_wait_for_each_other_are_a_deadlock():
    plan = make_plan(*chain_case(2, 2))
    rank_0 = "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1 0REDUCE_GRAD"
    rank_1 = "1RECV_F0<0 1F0 1B0 1RECV_F1<0 1SEND_B0>0 1F1 1B1 1SEND_B1>0 1REDUCE_GRAD"
    validate_plan(with_lines(plan, [rank_0.split(), rank_1.split()]))
    crossed = rank_1.split()
    swap(crossed, "1RECV_F1<0", "1SEND_B0>0")
    with pytest.raises(PlanDeadlockError, match="rank 0: 0SEND_F1>1, rank 1: 1SEND_B0>0"):
        validate_plan(with_lines(plan, [rank_0.split(), crossed]))


def test_order_inside_a_rank_counts_where_nothing_is_sent():
    plan = make_plan(*chain_case(1, 1))
    validate_plan(plan)
    problem, _ = encoder_case()
    single = problem.model_copy(update={"num_ranks": 1, "memory_limit_bytes": (10**9,)})
    plan = make_plan(single, partition_from_layers({"vision": [[2]], "language": [[2]]}, 1))
    lines = lines_of(plan)
    swap(lines[0], "0F0", "1F0")
    with pytest.raises(PlanError, match="1F0 comes before 0F0, which it needs"):
        validate_plan(with_lines(plan, lines))
    lines = lines_of(plan)
    swap(lines[0], "0B0", "1B0")
    with pytest.raises(PlanError, match="0B0 comes before 1B0, which it needs"):
        validate_plan(with_lines(plan, lines))


@pytest.mark.parametrize(("before", "after"), [("0F0", "0I0"), ("0I0", "0W0")])
def test_halves_of_a_backward_have_their_order(before, after):
    plan = make_plan(*chain_case(1, 1), split_backward=True)
    validate_plan(plan)
    lines = lines_of(plan)
    swap(lines[0], before, after)
    with pytest.raises(PlanError, match=f"{after} comes before {before}"):
        validate_plan(with_lines(plan, lines))


@pytest.mark.parametrize(("graph", "word"), [("frozen encoder", "0B0"), ("frozen encoder", "0I0")])
def test_a_stage_with_nothing_trainable_before_it_has_no_backward(graph, word):
    plan = make_plan(*encoder_case(graph))
    lines = lines_of(plan)
    lines[0].append(word)
    with pytest.raises(PlanError, match=f"{word}: 0F0 has no backward"):
        validate_plan(with_lines(plan, lines))


def test_a_frozen_stage_after_a_trainable_one_has_input_gradients_only():
    plan = make_plan(*encoder_case("frozen backbone"))
    lines = lines_of(plan)
    assert "2I0" in lines[0]
    lines[0][lines[0].index("2I0")] = "2B0"
    with pytest.raises(PlanError, match="2I0 is missing"):
        validate_plan(with_lines(plan, lines))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Recompute(0, 0, 0, (1,))], r"layers \[1\] \(expected each once, from 0 to 0:"),
        ([Recompute(0, 0, 0, (0, 0))], r"layers \[0, 0\]"),
        ([Recompute(0, 5, 0, (0,))], "recompute of 0F5: no such work"),
        ([Recompute(0, 0, 0, (0,))] * 2, "comes 2 times"),
    ],
)
def test_a_wrong_recomputation_is_refused(plan, entries, message):
    validate_plan(dataclasses.replace(plan, recompute=(Recompute(0, 0, 0, (0,)),)))
    with pytest.raises(PlanError, match=message):
        validate_plan(dataclasses.replace(plan, recompute=tuple(entries)))


def test_recomputation_of_what_stores_nothing_is_refused():
    plan = make_plan(*encoder_case("frozen encoder"))
    with pytest.raises(PlanError, match="no backward"):
        validate_plan(dataclasses.replace(plan, recompute=(Recompute(0, 0, 0, (0,)),)))


def test_memory_above_the_limit_names_rank_and_bytes():
    plan = make_plan(*chain_case(2, 2, memory_limit_bytes=[20, 20]), algorithm="one_f_one_b")
    check_memory(plan, simulate(plan).peak_bytes)
    with pytest.raises(PlanMemoryError, match=r"rank 1: the plan needs 21 bytes \(limit 20"):
        check_memory(plan, (20, 21))


@given(case=cases(), data=st.data())
@settings(max_examples=60)
def test_no_action_can_be_dropped_or_doubled(case, data):
    plan = make_plan(*case)
    places = [(rank, i) for rank, line in enumerate(plan.actions) for i in range(len(line))]
    rank, index = data.draw(st.sampled_from(places))
    line = plan.actions[rank]
    for spoiled in (line[:index] + line[index + 1 :], line[: index + 1] + line[index:]):
        actions = tuple(spoiled if r == rank else a for r, a in enumerate(plan.actions))
        with pytest.raises(PlanError):
            validate_plan(dataclasses.replace(plan, actions=actions))


def test_every_action_of_the_vocabulary_is_checked_for_its_rank(plan):
    kinds = {Action.parse(word).type for line in lines_of(plan) for word in line}
    for kind in kinds:
        action = next(a for a in plan.actions[0] if a.type is kind)
        moved = (
            tuple(a for a in plan.actions[0] if a != action),
            (*plan.actions[1], action),
        )
        with pytest.raises(PlanError, match="belongs to rank 0"):
            validate_plan(dataclasses.replace(plan, actions=moved))
