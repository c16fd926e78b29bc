"""Data of the coming forward, moved while others compute; checks of values at the end of a step."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from executor_program import CASES
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    RerunMode,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_modules import WIDTH, build_stages

from megatron_dip.costs import Boundary
from megatron_dip.integration import device_feed
from megatron_dip.integration.device_feed import DeviceFeed
from megatron_dip.integration.late_checks import checked_at_the_end
from megatron_dip.models.staged import StagedModel
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Work
from megatron_dip.planner import PlannedBatch, make_plan
from megatron_dip.runtime import Channels, Executor, ForwardCall, ModuleRunner

CPU = torch.device("cpu")


class Listing(ModuleRunner):
    """Writes down what it is asked to prepare, and what it runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[tuple[str, Work]] = []

    def prepare(self, work: Work, stage: Any, sub_microbatch: Any) -> None:
        assert stage.stage == work.stage and sub_microbatch.module == stage.module
        self.calls.append(("prepare", work))

    def forward(self, call: ForwardCall) -> torch.Tensor:
        self.calls.append(("forward", call.work))
        return super().forward(call)


def test_each_forward_is_prepared_right_after_the_one_before_it() -> None:
    (case,) = CASES[1]
    partition = partition_from_layers(case.cut, 1)
    plan = make_plan(case.problem(1), partition, max_tokens=case.max_tokens)
    runner = Listing(stages=build_stages(case, partition.stages), data=case.rows())
    channels = Channels(rank=0, pipeline=[0], groups={}, device=CPU, timeout_seconds=5)
    executor = Executor(
        rank=0,
        channels=channels,
        boundary=lambda module, *, outer: Boundary("packed", WIDTH),
        dtype=torch.float64,
    )
    executor.run(PlannedBatch(plan, case.sizes()), runner)
    forwards = [work for what, work in runner.calls if what == "forward"]
    assert len(forwards) > 4
    expected = [("forward", forwards[0])]
    for work in forwards[1:]:
        expected += [("prepare", work), ("forward", work)]
    assert runner.calls == expected


# ---- the stream of copies -------------------------------------------------------------------


class Stream:
    """Writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"leave {self.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream: "Stream") -> None:
        self.log.append(f"{self.name} waits for {stream.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    cuda = device_feed.torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream("copies", log))
    monkeypatch.setattr(cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(cuda, "current_stream", lambda: Stream("kernels", log))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"used by {stream.name}")
    )
    return log


def test_kernels_wait_for_the_copies_that_they_read_and_keep_their_memory(log: list[str]) -> None:
    feed, work = DeviceFeed(CPU), Work(0, 1, 0)
    tensor = torch.zeros(1)
    feed.start(work, lambda: ("data", [tensor]))
    assert log == ["enter copies", "copies records", "leave copies"]
    log.clear()
    assert feed.take(work, lambda: pytest.fail("it was moved already")) == "data"
    assert log == ["kernels waits for event of copies", "used by kernels"]


def test_what_was_not_moved_ahead_is_moved_when_it_is_read(log: list[str]) -> None:
    feed = DeviceFeed(CPU)
    feed.start(Work(0, 1, 0), lambda: ("of a run that failed", []))
    feed.begin()
    log.clear()
    assert feed.take(Work(0, 1, 0), lambda: ("data", [])) == "data"
    assert log == []


def test_copies_of_a_step_wait_for_what_kernels_had_made_before_it(log: list[str]) -> None:
    DeviceFeed(CPU).begin()
    assert log == ["copies waits for kernels"]


def test_parts_that_are_made_on_the_device_are_named() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(3, device="cuda")
        data = {"there": there, "here": 1}
        moved, on_device = StagedModel.to_device(cast(Any, None), data, torch.device("cuda"))
    assert moved["there"] is there and on_device == [there]


# ---- checks ---------------------------------------------------------------------------------


@pytest.fixture
def _machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    yield
    monkeypatch.undo()


def check(value: torch.Tensor, seen: list[float]) -> None:
    def is_wrong(result: torch.Tensor) -> bool:
        seen.append(result.item())
        return bool(result.isnan())

    get_rerun_state_machine().validate_result(
        result=value, rejection_func=is_wrong, message="a loss", fatal=True
    )


@pytest.mark.usefixtures("_machine")
def test_values_are_looked_at_in_their_order_when_all_else_is_done() -> None:
    seen: list[float] = []
    first, second = torch.tensor(6.0, requires_grad=True) * 1.0, torch.tensor(2.0)
    with checked_at_the_end():
        check(first, seen)
        # As Megatron divides a loss.
        first /= 3.0
        check(second, seen)
        assert seen == []
    assert seen == [6.0, 2.0]
    check(second, seen)
    assert seen == [6.0, 2.0, 2.0]


@pytest.mark.usefixtures("_machine")
def test_a_loss_that_is_no_number_ends_the_step_after_its_last_action() -> None:
    done = []
    with pytest.raises(RuntimeError, match=r"Unexpected result nan.*a loss"), checked_at_the_end():
        check(torch.tensor(float("nan")), [])
        done.append("all else")
    assert done == ["all else"]


@pytest.mark.usefixtures("_machine")
def test_an_error_of_the_step_is_not_hidden_by_what_was_noted() -> None:
    with pytest.raises(ValueError, match="of the step"), checked_at_the_end():
        check(torch.tensor(float("nan")), [])
        raise ValueError("of the step")
    seen: list[float] = []
    check(torch.tensor(1.0), seen)
    assert seen == [1.0]
