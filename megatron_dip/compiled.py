"""Compiling numeric functions with Numba: on first use, kept on disk, without the interpreter lock.

A compiled function takes arrays, numbers and named tuples of them.  Its machine code is kept beside
the package, or in the user's cache folder where the package cannot be written to; see
``code_cache`` for what is done about files there that are damaged.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import numba

from megatron_dip.code_cache import CodeCache

__all__ = ["compiled", "inlined"]

logger = logging.getLogger(__name__)


def compiled[Function: Callable[..., object]](function: Function) -> Function:
    """``function`` as machine code; compiled when it is first called, not on import.

    It changes arrays that its caller made and makes none: without counting references, which would
    take most of the time of functions that are called for every action of a schedule.  Where its
    machine code cannot be kept, every process compiles for itself.
    """
    made: Any = numba.njit(nogil=True, _nrt=False)(function)
    try:
        # As ``cache=True`` does it with a cache of Numba's own.
        made._cache = CodeCache(function)
    except RuntimeError as error:
        logger.warning("%s is compiled anew by every process: %s", function.__name__, error)
    return cast(Function, made)


def inlined[Function: Callable[..., object]](function: Function) -> Function:
    """A part of a compiled function, put where it is called."""
    return cast(Function, numba.njit(nogil=True, _nrt=False, forceinline=True)(function))
