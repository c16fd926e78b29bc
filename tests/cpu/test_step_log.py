"""The numbers of a step reach what Megatron has for curves."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from megatron_dip.integration import feedback
from megatron_dip.plan import Action
from megatron_dip.report.steps import RankRecord, StepRecord
from megatron_dip.runtime.timeline import DeviceRecorder, MeasuredSpan, Recorder
from megatron_dip.simulator.measured import action_durations_us


def record_of(iteration: int) -> StepRecord:
    rank = RankRecord(
        busy_us=60e3,
        data_us=0.0,
        plan_us=2e3,
        static_bytes=0,
        predicted_bytes=0,
        stored_bytes=3 * 2**20,
    )
    return StepRecord(
        iteration=iteration,
        predicted_us=50e3,
        measured_us=80e3,
        predicted_step_us=0.0,
        step_us=90e3,
        action_error=0.125,
        tokens={},
        num_microbatches=1,
        planning={},
        ranks=(rank,),
    )


class Curves:
    """In the place of both of Megatron's writers, with the calls that Megatron itself makes."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.added: dict[int, dict[str, float]] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(values)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.added.setdefault(step, {})[name] = value


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Curves:
    made = Curves()
    monkeypatch.setattr(
        feedback,
        "run_arguments",
        lambda: SimpleNamespace(log_interval=100, tensorboard_log_interval=2),
    )
    monkeypatch.setattr(feedback, "get_wandb_writer", lambda: made)
    monkeypatch.setattr(feedback, "get_tensorboard_writer", lambda: made)
    return made


def test_curves_get_every_number_at_the_interval_of_megatron(curves: Curves):
    for iteration in range(1, 6):
        feedback.log_step(record_of(iteration))
    assert list(curves.logged) == [2, 4]
    assert curves.added == curves.logged
    assert curves.logged[2] == pytest.approx(
        {
            "dip/predicted_ms": 50.0,
            "dip/measured_ms": 80.0,
            "dip/prediction_error": 0.6,
            "dip/action_error": 0.125,
            "dip/plan_wait_ms": 2.0,
            "dip/idle_rank0": 0.25,
            "dip/activation_mib_rank0": 3.0,
        }
    )


def test_what_a_rank_does_after_an_action_is_the_actions_and_its_wait_is_not():
    recorder = Recorder()
    recorder.spans = [
        MeasuredSpan("plan", 0.0, 10.0, True),
        MeasuredSpan(Action.parse("0F0"), 12.0, 20.0, False),
        MeasuredSpan(Action.parse("0F1"), 23.0, 30.0, False),
        # Sends were posted until 34; the rest is waiting for a gradient.
        MeasuredSpan(Action.parse("0B0"), 34.0, 50.0, True),
        MeasuredSpan(Action.parse("0B0"), 51.0, 60.0, False),
    ]
    durations = {str(action): us for action, us in action_durations_us(recorder.spans)}
    assert durations == {"0F0": 10.0, "0F1": 14.0, "0B0": 10.0}


class SyntheticEvent:
    """Stands for ``torch.cuda.Event``: the device comes to it at the next of the given times."""

    times_us: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.is_awaited = False

    def record(self) -> None:
        self.at_us = SyntheticEvent.times_us.pop(0)

    def synchronize(self) -> None:
        self.is_awaited = True

    def elapsed_time(self, other: "SyntheticEvent") -> float:
        return (other.at_us - self.at_us) / 1000


def test_a_device_says_itself_what_an_action_took_whatever_the_host_did_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
):
    """The host runs ahead: its own spans lie between actions that the device is yet to come to."""
    monkeypatch.setattr(torch.cuda, "Event", SyntheticEvent)
    # The anchor; 0F0 from 100 to 200; a wait until 240; 0B0 from 240 to 300.
    SyntheticEvent.times_us = [0.0, 100.0, 200.0, 200.0, 240.0, 240.0, 300.0]
    recorder = DeviceRecorder()
    recorder._anchor_us = 0.0
    host = iter([50.0, 150.0, 250.0, 260.0])
    monkeypatch.setattr(recorder, "now_us", lambda: next(host))
    recorder.record("data", 10.0)
    begin = recorder.begin()
    recorder.record(Action.parse("0F0"), begin)
    recorder.record("look-ahead", 120.0)
    begin = recorder.begin()
    recorder.record(Action.parse("0B0"), begin, is_wait=True)
    recorder.record("plan", 210.0, is_wait=True)
    begin = recorder.begin()
    recorder.record(Action.parse("0B0"), begin)
    recorder.finish()
    durations = {str(action): us for action, us in action_durations_us(recorder.spans)}
    assert durations == pytest.approx({"0F0": 100.0, "0B0": 60.0})
