"""Small random changes of a cut: what the partitioner searches with.

A module is changed as the path that its data takes through the ranks
(:data:`megatron_dip.partitioner.cuts.Path`): layers go from one stage to another, stages change
places, a run of stages is passed in the other direction.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random

from megatron_dip.partitioner.cuts import Cut, Layers, layers_of, path_of

__all__ = ["changed"]

Stages = list[tuple[int, int]]
"""A path that is being changed: ranks and layers."""

# How often a size of sub-microbatches is changed, and how often one change is followed by another.
_SIZE_SHARE = 0.1
_AGAIN_SHARE = 0.3


def changed(cut: Cut, sizes: Mapping[str, Sequence[int | None]], random: Random) -> Cut:
    """Another cut that is like ``cut``; it may be equal where there is little to change.

    Args:
        cut: Where the change begins.
        sizes: Per module that can be split, the tokens that its sub-microbatches may hold at most.
        random: Decides.
    """
    if sizes and random.random() < _SIZE_SHARE:
        module = random.choice(sorted(sizes))
        size = _another_size(cut.sub_microbatch_tokens[module], sizes[module], random)
        return cut.with_tokens(module, size)
    while True:
        module = random.choice(sorted(cut.layers))
        change = random.choice(_CHANGES)
        cut = cut.with_layers(module, change(cut.layers[module], random))
        if random.random() >= _AGAIN_SHARE:
            return cut


def _another_size(tokens: int | None, sizes: Sequence[int | None], random: Random) -> int | None:
    """The size next to ``tokens``: far ones rarely suit a cut that is good with this one."""
    # Sizes fall, from no limit on: the last one that is not smaller.
    place = sum((size or math.inf) >= (tokens or math.inf) for size in sizes) - 1
    near = [other for other in (place - 1, place + 1) if 0 <= other < len(sizes)]
    return sizes[random.choice(near)]


def _shift(layers: Layers, random: Random) -> Layers:
    """One layer goes from a stage to another, often to one of the same rank."""
    path = list(path_of(layers))
    source = random.randrange(len(path))
    same = [place for place, stage in enumerate(path) if stage[0] == path[source][0]]
    target = random.choice(same if random.random() < 0.5 else range(len(path)))
    if source != target:
        path[target] = path[target][0], path[target][1] + 1
        path[source] = path[source][0], path[source][1] - 1
    return _layers(path, layers)


def _insert(layers: Layers, random: Random) -> Layers:
    """One layer gets a stage of its own, somewhere else, often on the same rank."""
    path = list(path_of(layers))
    source = random.randrange(len(path))
    rank, count = path[source]
    path[source] = rank, count - 1
    if random.random() < 0.5:
        rank = random.randrange(len(layers[0]))
    path.insert(random.randrange(len(path) + 1), (rank, 1))
    return _layers(path, layers)


def _relocate(layers: Layers, random: Random) -> Layers:
    """A stage comes earlier or later."""
    path = list(path_of(layers))
    stage = path.pop(random.randrange(len(path)))
    path.insert(random.randrange(len(path) + 1), stage)
    return _layers(path, layers)


def _swap(layers: Layers, random: Random) -> Layers:
    """Two stages that are near each other change places."""
    path = list(path_of(layers))
    first = random.randrange(len(path))
    second = min(len(path) - 1, first + random.randint(1, len(layers[0])))
    path[first], path[second] = path[second], path[first]
    return _layers(path, layers)


def _reverse(layers: Layers, random: Random) -> Layers:
    """Some stages are passed in the other direction."""
    path = list(path_of(layers))
    first = random.randrange(len(path))
    end = first + random.randint(2, 2 * len(layers[0]))
    path[first:end] = path[first:end][::-1]
    return _layers(path, layers)


def _join(layers: Layers, random: Random) -> Layers:
    """Two stages of a rank that follow one another become one."""
    path = list(path_of(layers))
    places = [place for place in range(1, len(path)) if path[place][0] == path[place - 1][0]]
    if places:
        place = random.choice(places)
        rank, count = path.pop(place)
        path[place - 1] = rank, path[place - 1][1] + count
    return _layers(path, layers)


def _move_row(layers: Layers, random: Random) -> Layers:
    """One layer per rank goes from a segment to another."""
    rows = [list(row) for row in layers]
    full = [segment for segment, row in enumerate(layers) if all(row)]
    if full:
        source, target = random.choice(full), random.randrange(len(rows))
        rows[source] = [count - 1 for count in rows[source]]
        rows[target] = [count + 1 for count in rows[target]]
    return _layers([stage for row in rows for stage in enumerate(row)], layers)


def _move_rank(layers: Layers, random: Random) -> Layers:
    """One layer goes from a rank to another: from its fullest segment to the emptiest."""
    rows = [list(row) for row in layers]
    ranks = range(len(layers[0]))
    source = random.choice([rank for rank in ranks if any(row[rank] for row in layers)])
    target = random.choice(ranks)
    full = max(range(len(rows)), key=lambda segment: (rows[segment][source], segment))
    empty = min(range(len(rows)), key=lambda segment: (rows[segment][target], segment))
    rows[full][source] -= 1
    rows[empty][target] += 1
    return _layers([stage for row in rows for stage in enumerate(row)], layers)


_CHANGES: tuple[Callable[[Layers, Random], Layers], ...] = (
    _shift,
    _insert,
    _relocate,
    _swap,
    _reverse,
    _join,
    _move_row,
    _move_rank,
)


def _layers(path: Stages, like: Layers) -> Layers:
    return layers_of([stage for stage in path if stage[1]], len(like[0]))
