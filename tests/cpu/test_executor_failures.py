"""The executor when something goes wrong: where it was, why, and nothing goes on in silence."""

import pytest
from runtime_suites import CaseReport, run_suite

Cases = dict[str, list[CaseReport | None]]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return run_suite("executor", 2, dies=1)


def test_a_message_that_is_never_sent_ends_both_ranks_within_the_limit(cases: Cases) -> None:
    """Though another message of the same channel comes instead."""
    for report in cases["missing send"]:
        assert report is not None
        assert report.result[0].startswith("ExecutionError from ChannelError: rank ")
        assert "limit 2 s" in report.result[0] and "--dip-timeout-seconds" in report.result[0]
    receiver = cases["missing send"][1]
    assert receiver is not None
    assert "1RECV_F1<0 on the channel rank 0 to rank 1 (outputs)" in receiver.result[0]


def test_after_a_failed_iteration_the_next_one_is_refused(cases: Cases) -> None:
    for report in cases["missing send"]:
        assert report is not None
        assert report.result[1].startswith("ChannelError from NoneType")
        assert "start the processes again" in report.result[1]


def test_an_action_that_raises_is_shown_inside_its_schedule(cases: Cases) -> None:
    report = cases["raising action"][1]
    assert report is not None
    assert (report.outcome, report.cause) == ("ExecutionError", "ZeroDivisionError")
    first, second = report.message.splitlines()
    assert first.startswith("rank 1, step ") and first.endswith("1F1: a bug in the model")
    assert "1RECV_F1<0" in second and ">>1F1<< 1SEND_F1>2" in second


def test_an_evaluation_leaves_no_gradients_graphs_or_messages(cases: Cases) -> None:
    for rank, report in enumerate(cases["forward only"]):
        assert report is not None
        nothing = {"gradients": 0, "in_flight": 0, "graphs": 0}
        assert report.result == nothing | {"losses": 2 * rank}


def test_a_plan_that_leaves_something_behind_is_reported(cases: Cases) -> None:
    for rank, report in enumerate(cases["leftover"]):
        assert report is not None and report.outcome == "ExecutionError"
        assert f"forwards without backward: {rank}F0 {rank}F1" in report.message
    assert all(report is not None and report.outcome == "ok" for report in cases["afterwards"])


def test_a_message_of_another_type_is_not_sent(cases: Cases) -> None:
    report = cases["other type"][0]
    assert report is not None and (report.outcome, report.cause) == ("ExecutionError", "DataError")
    assert "0SEND_F0>1 would send torch.float64 but its receiver expects torch.float32" in (
        report.message
    )


def test_when_a_rank_dies_the_others_end_and_say_so(cases: Cases) -> None:
    survivor, dead = cases["death"]
    assert dead is None
    assert survivor is not None and survivor.outcome == "ExecutionError"
    # Not "nothing came", which is said at the limit of a wait.
    assert "the other process has ended" in survivor.message
    assert "rank 1 to rank 0" in survivor.message
