"""The look-ahead: coming batches with their sizes, held so that they can be planned in time.

It sits beneath Megatron's rerun iterator, which replays what it has handed out, so that a step that
is run a second time sees the same objects and reads nothing new.  Whatever goes wrong with a batch
is raised where training comes to it, not where it was read ahead.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import batched
from typing import Any, NamedTuple

from megatron_dip.costs import BatchSizes, ItemSizes

__all__ = ["LookAhead", "SizedBatch"]


class SizedBatch(NamedTuple):
    """A microbatch as its source yields it, with the sizes of its items."""

    batch: Any
    sizes: ItemSizes
    """Always the same object, also in a copy of this one: that is how a batch is known."""


class _Held(NamedTuple):
    """A microbatch, or the error in its place, and the state of the source after it."""

    sized: SizedBatch | None
    error: Exception | None
    state: Any


class LookAhead:
    """An iterator over ``source`` that can be asked what comes next.

    Args:
        source: Microbatches of any kind.  One with a ``save_state`` method, as Megatron's external
            loaders have it, is asked for its state after every microbatch.
        items: Sizes of the items of a microbatch.
    """

    def __init__(self, source: Iterator[Any], items: Callable[[Any], ItemSizes]) -> None:
        self._source = source
        self._items = items
        self._held: deque[_Held] = deque()
        self._ended = False
        self._state: Any = self._source_state()

    def __iter__(self) -> Iterator[SizedBatch]:
        return self

    def __next__(self) -> SizedBatch:
        if not self._held:
            self._read()
        held = self._held[0]
        if held.error is not None:
            # Stays in its place: who asks again gets the same answer.
            raise held.error
        self._held.popleft()
        self._state = held.state
        assert held.sized is not None
        return held.sized

    @property
    def num_held(self) -> int:
        """Microbatches that have been read and not handed out."""
        return sum(held.error is None for held in self._held)

    def hold(self, num_microbatches: int) -> None:
        """Read until so many microbatches are held, or until the end or an error."""
        while not self._ended and len(self._held) < num_microbatches:
            self._read()

    def coming(self, num_microbatches: int) -> list[BatchSizes]:
        """Per batch of so many microbatches that is held as a whole, the sizes of its items."""
        sizes = [held.sized.sizes for held in self._held if held.sized is not None]
        groups = batched(sizes, num_microbatches)
        return [group for group in groups if len(group) == num_microbatches]

    def assignment_of(self, iteration: int) -> Any:
        """What the source moved in the batch of an iteration, where it moves anything: see
        ``AssignmentRecord``."""
        found = getattr(self._source, "assignment_of", None)
        return None if found is None else found(iteration)

    @property
    def save_state(self) -> Callable[[], Any]:
        """The state of the source after what was handed out, whatever was read ahead of it.

        Raises:
            AttributeError: The source has no state to save; Megatron asks with ``hasattr``.
        """
        if not hasattr(self._source, "save_state"):
            raise AttributeError(f"{type(self._source).__name__} has no save_state")
        return lambda: self._state

    def _read(self) -> None:
        sized = error = None
        try:
            batch = next(self._source)
            sized = SizedBatch(batch, self._items(batch))
        # The end of the data among them.
        except Exception as caught:
            error = caught
            self._ended = True
        self._held.append(_Held(sized, error, self._source_state()))

    def _source_state(self) -> Any:
        save_state = getattr(self._source, "save_state", None)
        return None if save_state is None else save_state()
