"""Compiling numeric functions with Numba: on first use, kept on disk, without the interpreter lock.

A compiled function takes arrays, numbers and named tuples of them.  Its machine code is kept beside
the package, or in the user's cache folder where the package cannot be written to.
"""

import logging
from collections.abc import Callable
from typing import cast

import numba

__all__ = ["compiled", "inlined"]

logger = logging.getLogger(__name__)


def compiled[Function: Callable[..., object]](function: Function) -> Function:
    """``function`` as machine code; compiled when it is first called, not on import.

    It changes arrays that its caller made and makes none: without counting references, which would
    take most of the time of functions that are called for every action of a schedule.  Where no
    folder for the machine code can be written to, every process compiles for itself.
    """
    options = {"nogil": True, "_nrt": False}
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    except RuntimeError as error:
        logger.warning("%s is compiled anew by every process: %s", function.__name__, error)
        return cast(Function, numba.njit(**options)(function))


def inlined[Function: Callable[..., object]](function: Function) -> Function:
    """A part of a compiled function, put where it is called."""
    return cast(Function, numba.njit(nogil=True, _nrt=False, forceinline=True)(function))
