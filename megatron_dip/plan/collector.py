"""Keeping Python's garbage collector away while many objects are made that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collection"]


@contextmanager
def without_collection() -> Iterator[None]:
    """A block, or a decorated function, during which no cycles are looked for.

    Every few hundred new tuples the collector looks for cycles, every few ten thousand in all
    objects of the process, though tuples of numbers form none: with a plan of 30,000 actions that
    takes longer than making it.  What other threads make meanwhile is looked through afterwards.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
