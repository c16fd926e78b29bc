"""The compiled inner loop of the assignment: exchanges that make loads more alike.

Groups are in *slots* (microbatches), slots in *places* (replicas, or again microbatches: then every
place has one slot).  A *measure* is the time of a module, or, the last one, that of all together.
With x the loads of two places and d what the first one loses to the second, the sum of squared
deviations from any mean changes by 2 * sum(d * (d - (x1 - x2))): half of that is a *gain*, better
where it is lower, and never below -sum((x1 - x2)^2) / 4.  That bound spares most of the search.

No exchange raises the largest load of any measure over the places, breaks a limit of a slot, or
leaves a slot empty.
"""

from megatron_dip.assignment.pool import Pool, Scratch
from megatron_dip.compiled import compiled, inlined
from megatron_dip.simulator.arrays import IntArray

__all__ = ["even_out"]

_ROUNDING = 1e-9
"""Of the largest load: what sums of floats may be off by."""
_MOST_MENDED = 6
"""Exchanges after which sides that are still too full are given up."""
_MOST_DIVIDED = 4
"""Places with which one is divided anew, for trial."""


@compiled
def even_out(
    pool: Pool,
    scratch: Scratch,
    groups: IntArray,
    tolerance_us: float,
    least_gain: float,
    is_within: bool,
) -> int:
    """Move and exchange groups between places until they are alike, or nothing helps.

    The place that is farthest off is improved first, by the move or exchange of single groups that
    gains most.

    Args:
        groups: [G]: all groups, the largest first.
        tolerance_us: A place is fine whose load is above the mean by no more, in every measure.
        least_gain: Exchanges that gain less are not made.
        is_within: Places are slots: they must not be below the mean by more, either, and where no
            exchange of single groups helps, the groups of two are divided anew.

    Returns:
        How many moves, exchanges and divisions were made.
    """
    num_done = 0
    scratch.is_stuck[:] = False
    while True:
        _survey(pool, scratch)
        place = _farthest(pool, scratch, tolerance_us, is_within)
        if place < 0:
            return num_done
        _list_members(pool, scratch, groups)
        if _find_exchange(pool, scratch, place, least_gain):
            _exchange(pool, scratch, place)
        elif not (is_within and _divide_anew(pool, scratch, place, least_gain)):
            scratch.is_stuck[place] = True
            continue
        num_done += 1


@inlined
def _survey(pool: Pool, scratch: Scratch) -> None:
    """Mean and largest load of every measure."""
    for k in range(pool.load_us.shape[1]):
        total, peak = 0.0, 0.0
        for place in range(len(pool.place_load_us)):
            total += pool.place_load_us[place, k]
            peak = max(peak, pool.place_load_us[place, k])
        scratch.mean_us[k] = total / len(pool.place_load_us)
        scratch.peak_us[k] = peak * (1.0 + _ROUNDING)


@inlined
def _farthest(pool: Pool, scratch: Scratch, tolerance_us: float, both_ways: bool) -> int:
    """The place farthest above the mean in any measure (or below it), or -1: none is too far, or
    all of those are stuck."""
    farthest, most_us = -1, tolerance_us
    for place in range(len(pool.place_load_us)):
        if not scratch.is_stuck[place]:
            for k in range(pool.load_us.shape[1]):
                off_us = pool.place_load_us[place, k] - scratch.mean_us[k]
                if both_ways:
                    off_us = abs(off_us)
                if off_us > most_us:
                    farthest, most_us = place, off_us
    return farthest


@compiled
def _list_members(pool: Pool, scratch: Scratch, groups: IntArray) -> None:
    first = scratch.first_member
    num_places = len(first) - 1
    for place in range(num_places + 1):
        first[place] = 0
    for group in groups:
        first[pool.place[group] + 1] += 1
    for place in range(num_places):
        first[place + 1] += first[place]
    for group in groups:
        scratch.member[first[pool.place[group]]] = group
        first[pool.place[group]] += 1
    for place in range(num_places, 0, -1):
        first[place] = first[place - 1]
    first[0] = 0


@inlined
def _bound(pool: Pool, place: int, other: int) -> float:
    """No exchange between two places gains more."""
    total = 0.0
    for k in range(pool.load_us.shape[1]):
        gap = pool.place_load_us[place, k] - pool.place_load_us[other, k]
        total -= gap * gap / 4.0
    return total


@compiled
def _find_exchange(pool: Pool, scratch: Scratch, place: int, least_gain: float) -> bool:
    """The best exchange of a group of ``place``, or of nothing, with one of another place, or
    nothing; whether there is any."""
    best_gain = -least_gain
    first = scratch.first_member
    for other in range(len(pool.place_load_us)):
        if other == place or _bound(pool, place, other) >= best_gain:
            continue
        # Behind the last member stands nothing, as -1.
        for near in range(first[place], first[place + 1] + 1):
            leaves = scratch.member[near] if near < first[place + 1] else -1
            for far in range(first[other], first[other + 1] + 1):
                enters = scratch.member[far] if far < first[other + 1] else -1
                gain = _gain(pool, place, other, leaves, enters)
                if (
                    gain < best_gain
                    and _may_fit(pool, leaves, enters)
                    and _stays_below(pool, scratch, place, other, leaves, enters)
                    and _find_slots(pool, scratch, place, other, leaves, enters)
                ):
                    best_gain = gain
    return best_gain < -least_gain


@inlined
def _gain(pool: Pool, place: int, other: int, leaves: int, enters: int) -> float:
    gain = 0.0
    for k in range(pool.load_us.shape[1]):
        lost = _lost(pool, leaves, enters, k)
        gain += lost * (lost - (pool.place_load_us[place, k] - pool.place_load_us[other, k]))
    return gain


@inlined
def _lost(pool: Pool, leaves: int, enters: int, measure: int) -> float:
    """What a place loses; -1 is nothing."""
    lost = 0.0
    if leaves >= 0:
        lost += pool.load_us[leaves, measure]
    if enters >= 0:
        lost -= pool.load_us[enters, measure]
    return lost


@inlined
def _stays_below(
    pool: Pool, scratch: Scratch, place: int, other: int, leaves: int, enters: int
) -> bool:
    """Whether no measure gets a load above the largest that it has."""
    below = True
    for k in range(pool.load_us.shape[1]):
        lost = _lost(pool, leaves, enters, k)
        most = max(pool.place_load_us[place, k] - lost, pool.place_load_us[other, k] + lost)
        below &= most <= scratch.peak_us[k]
    return below


@inlined
def _may_fit(pool: Pool, leaves: int, enters: int) -> bool:
    """Whether groups that take each other's slots keep the limits: in full slots few do."""
    if leaves < 0 or enters < 0:
        return True
    return _fits(pool, pool.slot[leaves], leaves, enters) and _fits(
        pool, pool.slot[enters], enters, leaves
    )


@compiled
def _find_slots(
    pool: Pool, scratch: Scratch, place: int, other: int, leaves: int, enters: int
) -> bool:
    """Note an exchange and the slots that it fills; whether there are some."""
    leaves_to = enters_to = -1
    if leaves >= 0 and enters >= 0:
        # Each takes the other's slot.
        leaves_to, enters_to = pool.slot[enters], pool.slot[leaves]
    elif leaves >= 0:
        leaves_to = _emptiest(pool, other, leaves)
    elif enters >= 0:
        enters_to = _emptiest(pool, place, enters)
    if leaves_to < 0 and enters_to < 0:
        return False
    scratch.best[0] = other
    scratch.best[1], scratch.best[2] = leaves, leaves_to
    scratch.best[3], scratch.best[4] = enters, enters_to
    return True


@inlined
def _emptiest(pool: Pool, place: int, group: int) -> int:
    """The slot of ``place`` with the least load that ``group`` fits into, or -1: none, or the
    group is all that its own slot has."""
    emptiest = -1
    last = pool.load_us.shape[1] - 1
    if pool.slot_size[pool.slot[group]] > 1:
        for slot in range(pool.first_slot[place], pool.first_slot[place + 1]):
            if _fits(pool, slot, -1, group) and (
                emptiest < 0 or pool.slot_load_us[slot, last] < pool.slot_load_us[emptiest, last]
            ):
                emptiest = slot
    return emptiest


@inlined
def _fits(pool: Pool, slot: int, leaves: int, enters: int) -> bool:
    """Whether ``slot`` keeps its limits when one group, or none (-1), leaves and another enters."""
    held = pool.slot_bytes[slot] + pool.kept_bytes[enters]
    if leaves >= 0:
        held -= pool.kept_bytes[leaves]
    fits = held <= pool.byte_limit
    for d in range(pool.tokens.shape[1]):
        tokens = pool.slot_tokens[slot, d] + pool.tokens[enters, d]
        if leaves >= 0:
            tokens -= pool.tokens[leaves, d]
        fits &= tokens <= pool.token_limit[d]
    return fits


@inlined
def _exchange(pool: Pool, scratch: Scratch, place: int) -> None:
    if scratch.best[1] >= 0:
        _move(pool, scratch.best[1], scratch.best[2], scratch.best[0])
    if scratch.best[3] >= 0:
        _move(pool, scratch.best[3], scratch.best[4], place)


@compiled
def _move(pool: Pool, group: int, slot: int, place: int) -> None:
    old_slot, old_place = pool.slot[group], pool.place[group]
    for k in range(pool.load_us.shape[1]):
        pool.slot_load_us[old_slot, k] -= pool.load_us[group, k]
        pool.slot_load_us[slot, k] += pool.load_us[group, k]
        pool.place_load_us[old_place, k] -= pool.load_us[group, k]
        pool.place_load_us[place, k] += pool.load_us[group, k]
    for d in range(pool.tokens.shape[1]):
        pool.slot_tokens[old_slot, d] -= pool.tokens[group, d]
        pool.slot_tokens[slot, d] += pool.tokens[group, d]
    pool.slot_bytes[old_slot] -= pool.kept_bytes[group]
    pool.slot_bytes[slot] += pool.kept_bytes[group]
    pool.slot_size[old_slot] -= 1
    pool.slot_size[slot] += 1
    pool.slot[group], pool.place[group] = slot, place


@compiled
def _divide_anew(pool: Pool, scratch: Scratch, place: int, least_gain: float) -> bool:
    """Divide the groups of ``place`` and of that other one with which it gains most between the
    two; whether there is one.  Places are slots."""
    best_gain, best = -least_gain, -1
    scratch.is_tried[:] = False
    for _ in range(_MOST_DIVIDED):
        # The one that may gain most.
        next_bound, other = best_gain, -1
        for candidate in range(len(pool.place_load_us)):
            if candidate != place and not scratch.is_tried[candidate]:
                bound = _bound(pool, place, candidate)
                if bound < next_bound:
                    next_bound, other = bound, candidate
        if other < 0:
            break
        scratch.is_tried[other] = True
        gain = _divide(pool, scratch, place, other)
        if gain < best_gain:
            best_gain, best = gain, other
    if best < 0:
        return False
    _divide(pool, scratch, place, best)
    num_groups = _size(scratch, place) + _size(scratch, best)
    num_moved = 0
    for group in scratch.pair[:num_groups]:
        num_moved += scratch.side[group] != (pool.place[group] == best)
    # Which half goes where: so that fewer groups move.
    turned = 2 * num_moved > num_groups
    for group in scratch.pair[:num_groups]:
        target = best if (scratch.side[group] == 1) != turned else place
        if target != pool.place[group]:
            _move(pool, group, target, target)
    return True


@inlined
def _size(scratch: Scratch, place: int) -> int:
    return scratch.first_member[place + 1] - scratch.first_member[place]


@compiled
def _divide(pool: Pool, scratch: Scratch, place: int, other: int) -> float:
    """Put the groups of two places, the largest first, each on the side with which it has less in
    common, in times and in tokens, and note it in ``scratch.side``.  Sides that are too full then
    exchange groups until they are not.

    Returns:
        The gain; 0 where a limit is broken.
    """
    scratch.side_load_us[:] = 0.0
    scratch.side_tokens[:] = 0
    scratch.side_bytes[:] = 0
    first = scratch.first_member
    near, far = first[place], first[other]
    num_groups = _size(scratch, place) + _size(scratch, other)
    num_1 = 0
    for index in range(num_groups):
        if far == first[other + 1] or (
            near < first[place + 1]
            and pool.size[scratch.member[near]] >= pool.size[scratch.member[far]]
        ):
            group = scratch.member[near]
            near += 1
        else:
            group = scratch.member[far]
            far += 1
        scratch.pair[index] = group
        side = 1 if _common(pool, scratch, group) < 0.0 else 0
        scratch.side[group] = side
        num_1 += side
        scratch.side_bytes[side] += pool.kept_bytes[group]
        for k in range(pool.load_us.shape[1]):
            scratch.side_load_us[side, k] += pool.load_us[group, k]
        for d in range(pool.tokens.shape[1]):
            scratch.side_tokens[side, d] += pool.tokens[group, d]
    if num_1 == 0 or num_1 == num_groups or not _mend(pool, scratch, num_groups):
        return 0.0
    gain = 0.0
    for k in range(pool.load_us.shape[1]):
        gap = pool.place_load_us[place, k] - pool.place_load_us[other, k]
        lost = pool.place_load_us[place, k] - scratch.side_load_us[0, k]
        gain += lost * (lost - gap)
        if max(scratch.side_load_us[0, k], scratch.side_load_us[1, k]) > scratch.peak_us[k]:
            return 0.0
    return gain


@compiled
def _mend(pool: Pool, scratch: Scratch, num_groups: int) -> bool:
    """Exchange groups of the two sides, two at a time, until both keep their limits; whether that
    succeeds."""
    for _ in range(_MOST_MENDED):
        least = _excess(pool, scratch, -1, -1)
        if least == 0.0:
            return True
        give = take = -1
        for one in scratch.pair[:num_groups]:
            for two in scratch.pair[:num_groups]:
                if scratch.side[one] == 0 and scratch.side[two] == 1:
                    excess = _excess(pool, scratch, one, two)
                    if excess < least:
                        least, give, take = excess, one, two
        if give < 0:
            return False
        scratch.side[give], scratch.side[take] = 1, 0
        scratch.side_bytes[0] += pool.kept_bytes[take] - pool.kept_bytes[give]
        scratch.side_bytes[1] += pool.kept_bytes[give] - pool.kept_bytes[take]
        for k in range(pool.load_us.shape[1]):
            more_us = pool.load_us[take, k] - pool.load_us[give, k]
            scratch.side_load_us[0, k] += more_us
            scratch.side_load_us[1, k] -= more_us
        for d in range(pool.tokens.shape[1]):
            more_tokens = pool.tokens[take, d] - pool.tokens[give, d]
            scratch.side_tokens[0, d] += more_tokens
            scratch.side_tokens[1, d] -= more_tokens
    return _excess(pool, scratch, -1, -1) == 0.0


@inlined
def _excess(pool: Pool, scratch: Scratch, give: int, take: int) -> float:
    """By what parts of their limits the two sides are too full, once side 0 gives one group and
    takes another; -1 is none."""
    excess = 0.0
    more = pool.kept_bytes[take] - pool.kept_bytes[give] if give >= 0 else 0
    excess += max(0, scratch.side_bytes[0] + more - pool.byte_limit) / max(1.0, pool.byte_limit)
    excess += max(0, scratch.side_bytes[1] - more - pool.byte_limit) / max(1.0, pool.byte_limit)
    for d in range(pool.tokens.shape[1]):
        limit = pool.token_limit[d]
        more = pool.tokens[take, d] - pool.tokens[give, d] if give >= 0 else 0
        excess += max(0, scratch.side_tokens[0, d] + more - limit) / max(1.0, limit)
        excess += max(0, scratch.side_tokens[1, d] - more - limit) / max(1.0, limit)
    return excess


@inlined
def _common(pool: Pool, scratch: Scratch, group: int) -> float:
    """Above zero where ``group`` has more in common with side 1 than with side 0."""
    mean_us = scratch.mean_us[pool.load_us.shape[1] - 1]
    common = 0.0
    for k in range(pool.load_us.shape[1]):
        more_us = scratch.side_load_us[1, k] - scratch.side_load_us[0, k]
        common += pool.load_us[group, k] * more_us / (mean_us * mean_us)
    for d in range(pool.tokens.shape[1]):
        limit = float(max(1, pool.token_limit[d]))
        more_tokens = scratch.side_tokens[1, d] - scratch.side_tokens[0, d]
        common += pool.tokens[group, d] * more_tokens / (limit * limit)
    return common
