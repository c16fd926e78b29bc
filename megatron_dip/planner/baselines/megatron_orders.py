"""The orders in which Megatron-LM's two pipeline schedules compute, per rank.

Mirrors ``megatron/core/pipeline_parallel/schedules.py`` of Megatron-Core 0.19:
``forward_backward_pipelining_without_interleaving`` (1F1B; Narayanan et al., PipeDream-Flush,
arXiv 2006.09503) and ``forward_backward_pipelining_with_interleaving`` (arXiv 2104.04473) with its
``get_schedule_table`` and ``get_pp_rank_microbatches``.
"""

from typing import NamedTuple

from megatron_dip.errors import InfeasibleError

__all__ = ["Step", "interleaved_order", "microbatch_group_size", "one_f_one_b_order"]


class Step(NamedTuple):
    """One forward or backward of a rank."""

    is_backward: bool
    chunk: int
    """Which of the rank's pieces, counted from 0."""
    microbatch: int


def one_f_one_b_order(num_ranks: int, num_microbatches: int, rank: int) -> list[Step]:
    """Forwards to fill the pipeline, then forward and backward in turn, then what is left."""
    num_warmup = min(num_ranks - rank - 1, num_microbatches)
    forwards = [Step(False, 0, number) for number in range(num_microbatches)]
    backwards = [Step(True, 0, number) for number in range(num_microbatches)]
    return _in_turn(forwards, backwards, num_warmup)


def interleaved_order(
    num_ranks: int, num_virtual: int, num_microbatches: int, rank: int
) -> list[Step]:
    """The interleaved schedule with ``num_virtual`` pieces per rank.

    Raises:
        InfeasibleError: There are fewer microbatches than ranks, which Megatron refuses.
    """
    group_size = microbatch_group_size(num_ranks, num_microbatches)
    table = [
        (number, chunk)
        for start in range(0, num_microbatches, group_size)
        for chunk in range(num_virtual)
        for number in range(start, min(start + group_size, num_microbatches))
    ]
    num_warmup = (num_ranks - rank - 1) * 2 + (num_virtual - 1) * group_size
    forwards = [Step(False, chunk, number) for number, chunk in table]
    backwards = [Step(True, num_virtual - 1 - chunk, number) for number, chunk in table]
    return _in_turn(forwards, backwards, min(num_warmup, len(table)))


def microbatch_group_size(num_ranks: int, num_microbatches: int) -> int:
    """Microbatches that pass a piece one after the other: the fewest that Megatron takes.

    That is the number of ranks where it divides the microbatches.  Elsewhere Megatron wants at
    least as many microbatches as ranks in the last group (``microbatch_group_size_per_vp_stage``).

    Raises:
        InfeasibleError: There are fewer microbatches than ranks.
    """
    for size in range(num_ranks, num_microbatches + 1):
        rest = num_microbatches % size
        if rest == 0 or rest >= num_ranks:
            return size
    raise InfeasibleError(
        f"{num_microbatches} microbatches on {num_ranks} ranks: Megatron's interleaved schedule "
        f"needs at least as many microbatches as ranks"
    )


def _in_turn(forwards: list[Step], backwards: list[Step], num_warmup: int) -> list[Step]:
    steps = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        steps += [forward, backward]
    return steps + backwards[len(forwards) - num_warmup :]
