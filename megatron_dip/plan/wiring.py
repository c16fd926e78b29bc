"""The dependencies of one batch as flat arrays: what everything that must be fast computes on.

Works are numbered by microbatch, module (upstream first), place of the stage in its module's chain,
and sub-microbatch: whoever is read comes before whoever reads it.  Stages are counted in the same
order, by module and place in its chain; the *place* of a stage is its index there.  Messages are
the forward ones; every one has a gradient back where its source has a backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.partition import Partition
from megatron_dip.plan.trained import StageBackward
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["BoolArray", "FloatArray", "IntArray", "Wiring", "wire"]

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Wiring(NamedTuple):
    """N works, M forward messages with E readers in all, S stages."""

    place: IntArray
    """[N]: of the work's stage."""
    stage: IntArray
    """[N]: number of the stage."""
    rank: IntArray
    """[N]"""
    microbatch: IntArray
    """[N]"""
    sub: IntArray
    """[N]"""
    group: IntArray
    """[N]: index of the work's sub-microbatch in ``graph.sub_microbatches``."""
    has_backward: BoolArray
    """[N]"""
    has_weight_grad: BoolArray
    """[N]"""
    first_work: IntArray
    """[S, num_microbatches]: works of one stage in one microbatch follow one another."""
    num_subs: IntArray
    """[S, num_microbatches]"""
    place_stage: IntArray
    """[S]: number of the stage at a place."""
    place_rank: IntArray
    """[S]"""
    source: IntArray
    """[M]: the work that makes the message; ascending."""
    target: IntArray
    """[M]: place of the stage that reads it; ascending for one source."""
    crosses: BoolArray
    """[M]: between two ranks."""
    has_gradient: BoolArray
    """[M]: a gradient goes back."""
    first_message: IntArray
    """[N + 1]: work n makes the messages first_message[n] to first_message[n + 1]."""
    first_reader: IntArray
    """[M + 1]: message m is read by the works reader[first_reader[m]] to
    reader[first_reader[m + 1]]."""
    reader: IntArray
    """[E]"""

    @property
    def reader_source(self) -> IntArray:
        """[E]: the work that makes what ``reader`` reads."""
        return np.repeat(self.source, np.diff(self.first_reader))


class _Blocks(NamedTuple):
    """Per module and microbatch that has it, B in all."""

    module: IntArray
    """[B]: index in the order of the modules."""
    microbatch: IntArray
    first_group: IntArray
    num_subs: IntArray
    num_stages: IntArray
    first_work: IntArray
    """[B + 1]"""


def wire(
    problem: Problem,
    partition: Partition,
    groups: Sequence[SubMicrobatch],
    links: Sequence[tuple[int, int]],
    backwards: Sequence[StageBackward],
) -> Wiring:
    """Lay out the works of a batch and connect them.

    Args:
        problem: The batch.
        partition: The stages.
        groups: The sub-microbatches by microbatch, module (upstream first) and number.
        links: Pairs of sub-microbatches of which the second reads what the first makes.
        backwards: By module and place in its chain, as stages are counted.
    """
    chains = [partition.chains[name] for name in problem.module_order]
    stages = [stage for chain in chains for stage in chain]
    length = np.array([len(chain) for chain in chains])
    group_sub = np.array([group.sub for group in groups], dtype=np.int64)
    group_block = np.cumsum(group_sub == 0) - 1
    blocks = _blocks(problem, groups, np.flatnonzero(group_sub == 0), length)

    block = np.repeat(np.arange(len(blocks.module)), np.diff(blocks.first_work))
    offset = np.arange(len(block)) - blocks.first_work[block]
    position, sub = np.divmod(offset, blocks.num_subs[block])
    place = (np.cumsum(length) - length)[blocks.module[block]] + position
    microbatch = blocks.microbatch[block]
    first_work = np.zeros((len(stages), problem.num_microbatches), dtype=np.int64)
    num_subs = np.zeros_like(first_work)
    is_first = sub == 0
    first_work[place[is_first], microbatch[is_first]] = np.flatnonzero(is_first)
    num_subs[place[is_first], microbatch[is_first]] = blocks.num_subs[block[is_first]]

    passed_on = np.flatnonzero(position < blocks.num_stages[block] - 1)
    above, below = np.array(links, dtype=np.int64).reshape(-1, 2).T
    # A module's last stage hands over to the first one of a module that reads it.
    above_last = blocks.first_work[group_block[above] + 1] - blocks.num_subs[group_block[above]]
    made = np.concatenate([passed_on, above_last + group_sub[above]])
    read = np.concatenate(
        [
            passed_on + blocks.num_subs[block[passed_on]],
            blocks.first_work[group_block[below]] + group_sub[below],
        ]
    )
    by_source = np.lexsort((read, made))
    made, read = made[by_source], read[by_source]
    opens = np.ones(len(made), dtype=bool)
    opens[1:] = (made[1:] != made[:-1]) | (place[read[1:]] != place[read[:-1]])
    first = np.flatnonzero(opens)
    source, target = made[first], place[read[first]]
    place_rank = np.array([stage.rank for stage in stages], dtype=np.int64)
    place_stage = np.array([stage.stage for stage in stages], dtype=np.int64)
    has_backward = np.array([backward.has_backward for backward in backwards])[place]
    return Wiring(
        place=place,
        stage=place_stage[place],
        rank=place_rank[place],
        microbatch=microbatch,
        sub=sub,
        group=blocks.first_group[block] + sub,
        has_backward=has_backward,
        has_weight_grad=np.array([backward.has_weight_grad for backward in backwards])[place],
        first_work=first_work,
        num_subs=num_subs,
        place_stage=place_stage,
        place_rank=place_rank,
        source=source,
        target=target,
        crosses=place_rank[place[source]] != place_rank[target],
        has_gradient=has_backward[source],
        first_message=np.searchsorted(source, np.arange(len(block) + 1)),
        first_reader=np.append(first, len(made)),
        reader=read,
    )


def _blocks(
    problem: Problem, groups: Sequence[SubMicrobatch], first_group: IntArray, length: IntArray
) -> _Blocks:
    index = {name: number for number, name in enumerate(problem.module_order)}
    firsts = [groups[number] for number in first_group.tolist()]
    module = np.array([index[group.module] for group in firsts], dtype=np.int64)
    num_subs = np.diff(np.append(first_group, len(groups)))
    return _Blocks(
        module=module,
        microbatch=np.array([group.microbatch for group in firsts], dtype=np.int64),
        first_group=first_group,
        num_subs=num_subs,
        num_stages=length[module],
        first_work=np.concatenate([[0], np.cumsum(num_subs * length[module])]),
    )
