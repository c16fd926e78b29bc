"""What a rank did when: the measured counterpart of a simulated timeline."""

import time
from typing import Any, NamedTuple

import torch

__all__ = ["DeviceRecorder", "MeasuredSpan", "Recorder", "create_recorder"]


class MeasuredSpan(NamedTuple):
    """One piece of work or wait; times in microseconds of the host's monotonic clock."""

    label: object
    """The action that was run or that waited, or what else the rank did; read as text."""
    start_us: float
    end_us: float
    is_wait: bool
    is_device: bool = False
    """Begin and end are events of the device's stream, between which it did nothing else; else the
    host's clock when it called and returned."""


class Recorder:
    """Collects the spans of one iteration, by the host's clock.

    The clock is shared by all processes of a host, so that their spans can be laid side by side.
    """

    def __init__(self) -> None:
        self.spans: list[MeasuredSpan] = []

    @staticmethod
    def now_us() -> float:
        return time.perf_counter_ns() / 1000.0

    def begin(self) -> Any:
        """The begin of something that a rank does, for :meth:`record`."""
        return self.now_us()

    def record(self, label: object, begin: Any, *, is_wait: bool = False) -> None:
        """Add a span that ends now."""
        self.spans.append(MeasuredSpan(label, begin, self.now_us(), is_wait))

    def finish(self) -> None:
        """Complete ``spans``; the device must have done all that was recorded, or is waited for."""


class DeviceRecorder(Recorder):
    """The same by events on a GPU's stream, where the host only launches.

    Spans that begin with a time of the host (a number) stay the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[object, torch.cuda.Event, torch.cuda.Event, bool]] = []
        self._anchor = self._event()
        self._anchor_us = self.now_us()

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> Any:
        """See :class:`Recorder`."""
        return self._event()

    def record(self, label: object, begin: Any, *, is_wait: bool = False) -> None:
        """See :class:`Recorder`."""
        if isinstance(begin, float):
            super().record(label, begin, is_wait=is_wait)
        else:
            self._pending.append((label, begin, self._event(), is_wait))

    def finish(self) -> None:
        """See :class:`Recorder`."""
        for label, begin, end, is_wait in self._pending:
            end.synchronize()
            start_us, end_us = (
                self._anchor_us + 1000.0 * self._anchor.elapsed_time(event)
                for event in (begin, end)
            )
            self.spans.append(MeasuredSpan(label, start_us, end_us, is_wait, is_device=True))
        self._pending = []
        self.spans.sort(key=lambda span: span.start_us)


def create_recorder(device: torch.device) -> Recorder:
    """The recorder for stages that compute on ``device``."""
    # In CPU mode, tensors for a GPU are on the host, which then computes itself.
    is_there = torch.empty(0, device=device).device.type == "cuda"
    return DeviceRecorder() if is_there else Recorder()
