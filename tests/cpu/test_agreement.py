"""Agreeing on a plan: all ranks get the owner's, or all raise the same error and run nothing."""

import pytest
from runtime_suites import CaseReport, run_suite

from megatron_dip.runtime import connected_groups

Cases = dict[str, list[CaseReport | None]]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return run_suite("agreement", 2)


def test_all_ranks_get_the_plan_that_the_owner_made(cases: Cases) -> None:
    owner, other = cases["same everywhere"]
    assert owner is not None and owner.outcome == "ok" and "0SEND_F0>1" in owner.result
    assert other is not None and other.result == owner.result


def test_a_plan_that_was_offered_is_used_and_none_is_made(cases: Cases) -> None:
    owner, other = cases["offered"]
    assert owner is not None and owner.outcome == "ok" and other is not None
    num_made, (first, again, long, last) = owner.result
    # Three are made to be offered, and one because the second did not fit into its message.
    assert num_made == 4 and other.result[1] == owner.result[1]
    assert first == again == last != long


def test_a_plan_that_was_offered_is_kept_while_an_evaluation_comes_between(cases: Cases) -> None:
    owner, other = cases["offered out of turn"]
    assert owner is not None and owner.outcome == "ok" and other is not None
    num_made, (evaluation, training) = owner.result
    assert num_made == 2 and evaluation != training and other.result[1] == owner.result[1]


def test_a_rank_without_data_runs_what_the_others_run_with_the_sizes_of_its_items(
    cases: Cases,
) -> None:
    owner, other = cases["without data"]
    assert owner is not None and owner.outcome == "ok" and other is not None
    num_sent, texts, was_prepared = owner.result
    assert other.result == owner.result and was_prepared
    # All but the one that was offered, and the step that is run again.
    evaluation, training, again, text_only, later = texts
    assert num_sent == 3 and training == again == later
    assert len({evaluation, training, text_only}) == 3


def test_a_plan_that_arrived_damaged_is_sent_again(cases: Cases) -> None:
    owner, other = cases["offered with damage"]
    assert owner is not None and owner.outcome == "ok" and other is not None
    assert owner.result == other.result == cases["same everywhere"][0].result


def test_replicas_that_share_a_plan_run_what_their_own_batches_have(cases: Cases) -> None:
    owner, other = cases["shared"]
    assert owner is not None and owner.outcome == "ok" and other is not None
    (told, whole), (not_told, restricted) = owner.result, other.result
    assert (told, not_told) == ([[0, 1]], [])
    assert "0F1" in whole and "0F1" not in restricted
    for line, other_line in zip(whole.splitlines(), restricted.splitlines(), strict=True):
        kept = [action for action in line.split() if action in other_line.split()]
        assert kept == other_line.split()


@pytest.mark.parametrize(
    ("case", "error", "reason"),
    [
        ("another batch", "PlanDigestError", "rank 1: the plan was made for batch"),
        ("shared, another batch", "PlanDigestError", "rank 1: the plan was made for batch"),
        ("another partition", "PlanDigestError", "rank 1: the plan was made for partition"),
        ("offered to another batch", "PlanDigestError", "rank 1: the plan was made for batch"),
        ("damaged plan", "PlanDigestError", "rank 1: the plan arrived damaged"),
        ("differing plan", "PlanDigestError", "rank 1: its bytes differ from the owner's"),
        ("planner refuses", "PlanningError", "ConfigError: no planner for this"),
        ("planner has a bug", "PlanningError", "ZeroDivisionError: a bug"),
    ],
)
def test_what_one_rank_finds_wrong_all_ranks_raise_with_the_same_words(
    cases: Cases, case: str, error: str, reason: str
) -> None:
    owner, other = cases[case]
    assert owner is not None and other is not None
    assert owner.outcome == other.outcome == error
    assert owner.message == other.message
    # Where the mistake is, the owner's traceback shows.
    assert owner.cause == (reason.split(":")[0] if error == "PlanningError" else "NoneType")
    assert reason in owner.message


def test_a_refused_plan_leaves_nothing_behind_for_the_next(cases: Cases) -> None:
    assert all(report is not None and report.outcome == "ok" for report in cases["afterwards"])


def test_a_planner_that_is_stuck_ends_the_wait_of_the_others(cases: Cases) -> None:
    other = cases["planner is stuck"][1]
    assert other is not None and other.outcome == "ChannelError"
    assert "agreeing on a plan" in other.message and "--dip-timeout-seconds" in other.message


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        # Four replicas of two ranks; experts on each rank alone, and among pairs of replicas.
        ([[0], [1], [2], [3], [4], [5], [6], [7]], [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_ranks_that_meet_in_experts_share_a_plan(
    experts: list[list[int]], expected: list[list[int]]
) -> None:
    assert connected_groups([[0, 4], [1, 5], [2, 6], [3, 7], *experts]) == expected
