"""What a rank did when: the measured counterpart of a simulated timeline."""

import time
from typing import NamedTuple

from megatron_dip.plan import Action

__all__ = ["MeasuredSpan", "Recorder"]


class MeasuredSpan(NamedTuple):
    """One action or wait; times in microseconds of the host's monotonic clock."""

    action: Action
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

    def record(self, action: Action, start_us: float, *, is_wait: bool = False) -> None:
        """Add a span that ends now."""
        self.spans.append(MeasuredSpan(action, start_us, self.now_us(), is_wait))

    def clear(self) -> None:
        self.spans = []
