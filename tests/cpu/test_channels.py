"""Channels: which there are, that messages keep apart and in order, and that waits end."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from runtime_suites import LIMIT_S, CaseReport, run_suite

from megatron_dip.errors import ChannelError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Channel, Message, pipeline_channels
from megatron_dip.runtime import Channels, create_channel_groups

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


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without NCCL")
def test_every_group_of_nccl_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch writes the name and the ranks of the group into them."""
    made: list[dist.ProcessGroupNCCL.Options] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **given: made.append(given["pg_options"]))
    channels = pipeline_channels(
        partition_from_layers({"vision": [[1, 1]], "language": [[1, 1]]}, 2), UPSTREAM
    )
    create_channel_groups(channels, [[0, 2], [1, 3]], 5, backend="nccl", num_communicators=2)
    assert len({id(options) for options in made}) == len(made) == 4 * len(channels)
    assert all(options.is_high_priority_stream for options in made)


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


def test_on_a_gpu_receives_are_posted_from_a_stream_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for NCCL and CUDA: the order of calls, and whose memory the buffer is."""
    calls: list[str] = []
    buffer = Mock()
    buffer.record_stream.side_effect = lambda stream: calls.append(f"read in {stream}")

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        calls.append(f"enter {name}")
        yield
        calls.append(f"leave {name}")

    def irecv(*_: object, **__: object) -> Mock:
        calls.append("post")
        return Mock(wait=lambda: calls.append("wait"))

    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "irecv", irecv)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "receiving")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "computing")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: calls.append("allocate") or buffer)
    groups = [Mock(), Mock()]
    channels = Channels(
        rank=1,
        pipeline=[0, 1],
        groups={Channel(0, 1, False): groups},
        device=torch.device("cuda", 0),
        timeout_seconds=1.0,
    )
    receive = channels.post_receive(Message(0, 1, 0, 0, False), 0, (2, 2), torch.float32)
    assert calls == ["enter receiving", "allocate", "post", "leave receiving"]
    assert channels.wait_receive(receive) is buffer
    assert calls[4:] == ["wait", "read in computing"]


def test_messages_take_the_communicators_of_their_channel_in_turn_from_the_first_of_a_plan_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[object] = []
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "irecv", lambda *_, group, **__: used.append(group))
    channels = Channels(
        rank=1,
        pipeline=[0, 1],
        groups={Channel(0, 1, False): ["a", "b", "c"], Channel(0, 1, True): ["x", "y", "z"]},
        device=torch.device("cpu"),
        timeout_seconds=1.0,
    )

    def post(*kinds: bool) -> str:
        used.clear()
        for number, is_gradient in enumerate(kinds):
            message = Message(0, 1, number, 0, is_gradient)
            channels.post_receive(message, 0, (1,), torch.float32)
        return " ".join(map(str, used))

    channels.begin(2)
    assert post(False, True, False, False, True) == "a x b a y"
    channels.begin(3)
    assert post(False, False, False, True, False) == "a b c x a"
    channels.begin(1)
    assert post(False, False) == "a a"
    with pytest.raises(ChannelError, match="takes 4 communicators"):
        channels.begin(4)
