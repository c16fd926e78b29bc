"""What a rank did when: the measured counterpart of a simulated timeline."""

import time
from typing import NamedTuple

__all__ = ["MeasuredSpan", "Recorder"]


class MeasuredSpan(NamedTuple):
    """One piece of work or wait; times in microseconds of the host's monotonic clock."""

    label: object
    """The action that was run or that waited, or what else the rank did; read as text."""
    start_us: float
    end_us: float
    is_wait: bool


class Recorder:
    """Collects the spans of one iteration.

    The clock is shared by all processes of a host, so that their spans can be laid side by side.
    """

    def __init__(self) -> None:
        self.spans: list[MeasuredSpan] = []

    @staticmethod
    def now_us() -> float:
        return time.perf_counter_ns() / 1000.0

    def record(self, label: object, start_us: float, *, is_wait: bool = False) -> None:
        """Add a span that ends now."""
        self.spans.append(MeasuredSpan(label, start_us, self.now_us(), is_wait))
