"""The orders of the static baselines against the tables of the installed Megatron-Core."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel import schedules

from megatron_dip.planner.baselines.megatron_orders import (
    Step,
    interleaved_order,
    microbatch_group_size,
    one_f_one_b_order,
)


def megatron_warmup(
    num_ranks: int, rank: int, num_virtual: int | None, num_microbatches: int, group_size: int
) -> int:
    """How many forwards Megatron runs before its first backward's turn comes."""
    place = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: num_ranks, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=num_virtual,
    )
    counts = schedules.get_pp_rank_microbatches(
        num_microbatches, num_virtual or 1, group_size, p2p_communicator=place
    )
    warmup: int = counts[2]
    return warmup


def in_megatrons_loops(table: list[tuple[int, int]], num_virtual: int, warmup: int) -> list[Step]:
    """Warm-up, steady state and cool-down as Megatron's schedules loop over their table."""
    forwards = [Step(False, chunk, number) for number, chunk in table]
    backwards = [Step(True, num_virtual - chunk - 1, number) for number, chunk in table]
    steps = forwards[:warmup]
    for index in range(len(table) - warmup):
        steps += [forwards[index + warmup], backwards[index]]
    for index in range(len(table) - warmup, len(table)):
        steps.append(backwards[index])
    return steps


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 11])
def test_one_f_one_b_is_megatrons(num_ranks: int, num_microbatches: int) -> None:
    for rank in range(num_ranks):
        warmup = megatron_warmup(num_ranks, rank, None, num_microbatches, num_ranks)
        table = [(number, 0) for number in range(num_microbatches)]
        assert one_f_one_b_order(num_ranks, num_microbatches, rank) == in_megatrons_loops(
            table, 1, warmup
        )


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_virtual", [2, 3])
@pytest.mark.parametrize("num_microbatches", [4, 7, 8, 9, 10, 16])
def test_interleaved_is_megatrons(num_ranks: int, num_virtual: int, num_microbatches: int) -> None:
    group_size = microbatch_group_size(num_ranks, num_microbatches)
    table = schedules.get_schedule_table(num_microbatches, num_virtual, group_size)
    for rank in range(num_ranks):
        warmup = megatron_warmup(num_ranks, rank, num_virtual, num_microbatches, group_size)
        assert interleaved_order(
            num_ranks, num_virtual, num_microbatches, rank
        ) == in_megatrons_loops(table, num_virtual, warmup)
