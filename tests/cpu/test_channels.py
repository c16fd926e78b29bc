"""Channels: which there are, that messages keep apart and in order, and that waits end."""

import pytest
from runtime_suites import LIMIT_S, CaseReport, run_suite

from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import pipeline_channels

UPSTREAM = {"vision": (), "language": ("vision",)}


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        # Four ranks, one segment: to the next rank, and from the last of vision back to the first.
        ({"vision": [[1, 1, 1, 1]], "language": [[1, 1, 1, 1]]}, "0>1 1>2 2>3 3>0"),
        # A chain goes past a rank without layers.
        ({"vision": [[1, 0, 1, 1]], "language": [[1, 1, 1, 1]]}, "0>1 0>2 1>2 2>3 3>0"),
        # One rank alone talks to nobody.
        ({"vision": [[2]], "language": [[1], [1]]}, ""),
    ],
)
def test_there_is_a_channel_each_way_between_ranks_that_exchange(
    cut: dict[str, list[list[int]]], expected: str
) -> None:
    channels = pipeline_channels(partition_from_layers(cut, len(cut["vision"][0])), UPSTREAM)
    forward = {f"{c.sender}>{c.receiver}" for c in channels if not c.is_gradient}
    backward = {f"{c.receiver}>{c.sender}" for c in channels if c.is_gradient}
    assert forward == backward == set(expected.split())
    assert list(channels) == sorted(set(channels)), "the same order on all ranks"


@pytest.fixture(scope="module")
def cases() -> dict[str, list[CaseReport | None]]:
    return run_suite("channels", 2)


@pytest.mark.parametrize("case", ["receives posted first", "sends posted first"])
def test_every_receive_gets_its_own_message(
    cases: dict[str, list[CaseReport | None]], case: str
) -> None:
    """Message k is k + 1 rows of two numbers k: outputs 0 to 2 one way, gradients 3 to 5 back."""

    def rows(*messages: int) -> list[list[float]]:
        return [[float(message)] * 2 * (message + 1) for message in messages]

    first, second = cases[case]
    assert first is not None and first.result == rows(3, 4, 5)
    assert second is not None and second.result == rows(0, 1, 2)


@pytest.mark.parametrize(
    ("case", "rank", "action"),
    [("silent sender", 1, "1RECV_F7<0"), ("silent receiver", 0, "0SEND_F7>1")],
)
def test_a_wait_for_a_silent_peer_ends_with_action_channel_limit_and_remedy(
    cases: dict[str, list[CaseReport | None]], case: str, rank: int, action: str
) -> None:
    report = cases[case][rank]
    assert report is not None
    assert report.outcome == "ChannelError"
    assert report.seconds >= LIMIT_S
    for part in (f"rank {rank}", action, "rank 0 to rank 1 (outputs)", "limit 2 s", "see its log"):
        assert part in report.message


def test_connected_channels_wait_for_no_communicator_within_a_plan(
    cases: dict[str, list[CaseReport | None]],
) -> None:
    """Not connected, the same plan comes to rest: both ranks wait on different channels."""
    for connected, not_connected in zip(
        cases["lazy, connected"], cases["lazy, not connected"], strict=True
    ):
        assert connected is not None and connected.outcome == "ok", connected
        assert not_connected is not None and not_connected.outcome == "ExecutionError"
    for one_queue in cases["lazy, one queue"]:
        assert one_queue is not None and one_queue.outcome == "ok", one_queue


def test_a_plan_with_more_communicators_than_channels_have_is_refused(
    cases: dict[str, list[CaseReport | None]],
) -> None:
    for report in cases["too few"]:
        assert report is not None and report.outcome == "ChannelError"
        assert "takes 2 communicators of each channel (expected at most 1" in report.message
