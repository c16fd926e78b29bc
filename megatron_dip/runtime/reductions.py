"""Gradient reductions: when the ones that a rank may start are started.

With one hardware queue a reduction that waits in its stream for the one before it holds up all that
is issued behind it, and replicas run different plans: one could wait for the other in a circle that
neither plan shows.  So a reduction is then started only when the one before it is known to have
ended; what is left at the end of the plan is started there.  Every rank keeps the order, so that
replicas still issue the same collectives in the same order.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Reduction", "ReductionQueue"]


class Reduction(Protocol):
    """One collective over the data-parallel replicas."""

    def start(self) -> None: ...

    def is_ended(self) -> bool:
        """Whether it is known to have ended; asking does not wait."""


class ReductionQueue:
    """The reductions of one rank in one step, in their order.

    Args:
        one_at_a_time: Hold each back until the one before it has ended.
    """

    def __init__(self, *, one_at_a_time: bool) -> None:
        self._one_at_a_time = one_at_a_time
        self._held: deque[Reduction] = deque()
        self._running: Reduction | None = None

    def add(self, reductions: Sequence[Reduction]) -> None:
        """Their gradients are complete: start them, or hold them back."""
        self._held.extend(reductions)
        self.advance()

    def advance(self) -> None:
        """Start what need not wait any more; waits for nothing."""
        while self._held and self._is_free():
            self._start_next()

    def finish(self) -> None:
        """Start what is left, in order: nothing of the step is issued behind it."""
        while self._held:
            self._start_next()

    def _is_free(self) -> bool:
        return not self._one_at_a_time or self._running is None or self._running.is_ended()

    def _start_next(self) -> None:
        self._running = self._held.popleft()
        self._running.start()
