"""Random numbers that are functions of a key and a place: any part of a matrix is drawn alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) gives four words
of 32 bits for a key and a counter.  The counter is the row and a group of four columns, so that a
rank draws the rows and columns that it holds and no others.  Normal values are quantiles of
uniform ones by the rational functions of Wichura's AS 241 (PPND7, seven digits).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dip.compiled import compiled, inlined

__all__ = ["Words", "draw_normal", "draw_uniform", "normal_quantile", "philox"]

type Words = tuple[np.uint64, np.uint64, np.uint64, np.uint64]
"""Four words of 32 bits, each in 64: products of two then need no type of their own."""

_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_FIRST_MULTIPLIER = np.uint64(0xD2511F53)
_SECOND_MULTIPLIER = np.uint64(0xCD9E8D57)
_FIRST_KEY_STEP = np.uint64(0x9E3779B9)
_SECOND_KEY_STEP = np.uint64(0xBB67AE85)
_WORDS_PER_COUNTER = 4
_MIDDLE = 0.425


@inlined
def philox(low_key: np.uint64, high_key: np.uint64, counter: Words) -> Words:
    """Four words for a counter of four."""
    first, second, third, fourth = counter
    for _ in range(_ROUNDS):
        left, right = first * _FIRST_MULTIPLIER, third * _SECOND_MULTIPLIER
        first, third = (right >> _HALF) ^ second ^ low_key, (left >> _HALF) ^ fourth ^ high_key
        second, fourth = right & _WORD, left & _WORD
        low_key = (low_key + _FIRST_KEY_STEP) & _WORD
        high_key = (high_key + _SECOND_KEY_STEP) & _WORD
    return first, second, third, fourth


@inlined
def normal_quantile(probability: float) -> float:
    """The value that a standard normal variable is below with this probability.

    Args:
        probability: Above 1e-10 and below 1 - 1e-10, to which the function for tails holds.
    """
    centred = probability - 0.5
    if abs(centred) <= _MIDDLE:
        r = _MIDDLE * _MIDDLE - centred * centred
        top = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
        bottom = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
        return centred * top / bottom
    r = math.sqrt(-math.log(min(probability, 1.0 - probability))) - 1.6
    top = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    bottom = (0.12021132975 * r + 0.73700164250) * r + 1.0
    return math.copysign(top / bottom, centred)


@compiled
def _fill(
    values: NDArray[np.float32],
    key: np.uint64,
    first_row: int,
    first_column: int,
    is_normal: bool,
    scale: float,
    shift: float,
) -> None:
    """Every value times ``scale`` plus ``shift``."""
    low_key, high_key = key & _WORD, key >> _HALF
    num_rows, num_columns = values.shape
    first_group = first_column // _WORDS_PER_COUNTER
    end_group = (first_column + num_columns - 1) // _WORDS_PER_COUNTER + 1
    for row in range(num_rows):
        row_word = np.uint64(first_row + row)
        for group in range(first_group, end_group):
            counter = (np.uint64(group), row_word, np.uint64(0), np.uint64(0))
            words = philox(low_key, high_key, counter)
            for place in range(_WORDS_PER_COUNTER):
                column = group * _WORDS_PER_COUNTER + place - first_column
                if 0 <= column < num_columns:
                    # The middle of a step of 2**-32: neither 0 nor 1.
                    value = (float(words[place]) + 0.5) * 2.0**-32
                    if is_normal:
                        value = normal_quantile(value)
                    values[row, column] = value * scale + shift


def draw_normal(
    values: NDArray[np.float32],
    key: int,
    first: Sequence[int] = (0, 0),
    *,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> None:
    """Fill a part of an endless matrix of normal values.

    Args:
        values: ``[rows, columns]``, of any strides.
        key: 64 bits; every key has a matrix of its own.
        first: Where in the matrix the part begins: row and column, below 2**32.
    """
    _fill(values, np.uint64(key), first[0], first[1], True, deviation, mean)


def draw_uniform(
    values: NDArray[np.float32],
    key: int,
    first: Sequence[int] = (0, 0),
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> None:
    """As :func:`draw_normal`, of values that are uniform between ``low`` and ``high``."""
    _fill(values, np.uint64(key), first[0], first[1], False, high - low, low)
