"""Groups and where they are, as the arrays that the compiled loop works on; see ``kernels``."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.simulator.arrays import BoolArray, FloatArray, IntArray

__all__ = ["Pool", "Scratch", "new_pool", "new_scratch", "place_sums"]


class Pool(NamedTuple):
    """Groups and where they are; G groups, C slots, P places, D modules, K = D + 1 measures."""

    load_us: FloatArray
    """[G, K]"""
    tokens: IntArray
    """[G, D]"""
    kept_bytes: IntArray
    """[G]"""
    size: FloatArray
    """[G]: the largest of its parts of a slot: of the mean time, or of a limit of tokens."""
    slot: IntArray
    """[G]: changed."""
    place: IntArray
    """[G]: changed."""
    slot_load_us: FloatArray
    """[C, K]: changed, as all that follows but the limits."""
    slot_tokens: IntArray
    """[C, D]"""
    slot_bytes: IntArray
    """[C]"""
    slot_size: IntArray
    """[C]: groups in it."""
    place_load_us: FloatArray
    """[P, K]"""
    first_slot: IntArray
    """[P + 1]: place p has the slots first_slot[p] to first_slot[p + 1]."""
    token_limit: IntArray
    """[D]"""
    byte_limit: int


class Scratch(NamedTuple):
    """Room for what the kernel notes down."""

    is_stuck: BoolArray
    """[P]: places that no exchange improves."""
    is_tried: BoolArray
    """[P]: places that one was divided anew with, for trial."""
    mean_us: FloatArray
    """[K]: loads of places."""
    peak_us: FloatArray
    """[K]: the largest loads that a place may have."""
    first_member: IntArray
    """[P + 1]"""
    member: IntArray
    """[G]: groups by the place they are in, the largest first."""
    pair: IntArray
    """[G]: the groups of two places that are divided anew, the largest first."""
    side: IntArray
    """[G]: 0 or 1, of two places that are divided anew."""
    side_load_us: FloatArray
    """[2, K]"""
    side_tokens: IntArray
    """[2, D]"""
    side_bytes: IntArray
    """[2]"""
    best: IntArray
    """[5]: the best exchange so far: the other place, what leaves and its slot to be, what enters
    and its slot to be; -1 for nothing."""


def new_pool(
    *,
    load_us: FloatArray,
    tokens: IntArray,
    kept_bytes: IntArray,
    slot: IntArray,
    first_slot: IntArray,
    limits: tuple[IntArray, int],
) -> Pool:
    """Groups in their slots, and what these hold.

    Args:
        load_us: [G, K]
        tokens: [G, D]
        kept_bytes: [G]
        slot: [G]
        first_slot: [P + 1]: the slots of every place.
        limits: [D] tokens, and bytes, of a slot.
    """
    num_slots = int(first_slot[-1])
    counts = np.diff(first_slot)
    place = np.repeat(np.arange(len(counts)), counts)[slot]
    token_limit, byte_limit = limits
    mean_us = load_us[:, -1].sum() / max(1, num_slots)
    parts = [load_us[:, -1] / mean_us if mean_us else load_us[:, -1]]
    parts += [tokens[:, d] / max(1, limit) for d, limit in enumerate(token_limit.tolist())]
    return Pool(
        load_us=np.ascontiguousarray(load_us),
        tokens=np.ascontiguousarray(tokens),
        kept_bytes=np.ascontiguousarray(kept_bytes),
        size=np.max(parts, axis=0),
        slot=slot.copy(),
        place=place,
        slot_load_us=place_sums(load_us, slot, num_slots),
        slot_tokens=place_sums(tokens, slot, num_slots),
        slot_bytes=place_sums(kept_bytes, slot, num_slots),
        slot_size=np.bincount(slot, minlength=num_slots),
        place_load_us=place_sums(load_us, place, len(counts)),
        first_slot=np.ascontiguousarray(first_slot),
        token_limit=token_limit,
        byte_limit=byte_limit,
    )


def place_sums[Number: np.generic](
    values: NDArray[Number], places: IntArray, num_places: int
) -> NDArray[Number]:
    """Of the rows in every place, in their order: the same sums on every machine."""
    found = np.zeros((num_places, *values.shape[1:]), dtype=values.dtype)
    np.add.at(found, places, values)
    return found


def new_scratch(pool: Pool) -> Scratch:
    """Room for what the kernel notes down about ``pool``."""
    num_places, num_measures = pool.place_load_us.shape
    return Scratch(
        is_stuck=np.zeros(num_places, dtype=np.bool_),
        is_tried=np.zeros(num_places, dtype=np.bool_),
        mean_us=np.zeros(num_measures),
        peak_us=np.zeros(num_measures),
        first_member=np.zeros(num_places + 1, dtype=np.int64),
        member=np.zeros(len(pool.slot), dtype=np.int64),
        pair=np.zeros(len(pool.slot), dtype=np.int64),
        side=np.zeros(len(pool.slot), dtype=np.int64),
        side_load_us=np.zeros((2, num_measures)),
        side_tokens=np.zeros((2, num_measures - 1), dtype=np.int64),
        side_bytes=np.zeros(2, dtype=np.int64),
        best=np.zeros(5, dtype=np.int64),
    )
