"""How many planner processes a plan owner starts."""

import logging

import pytest

from megatron_dip.runtime import RankPlace, num_planners


def node(num_cores: int, owners: set[int], name: str = "a", ranks: int = 8) -> list[RankPlace]:
    return [RankPlace(name, num_cores, False, rank in owners) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("wanted", "places", "expected"),
    [
        (1, node(8, {0}), 1),
        (4, node(96, {0}), 4),
        (4, node(10, {0}), 2),
        # Without tensor parallelism: every rank of the node begins a pipeline.
        (4, node(96, set(range(8))), 4),
        (4, node(24, set(range(8))), 2),
        (4, node(8, set(range(8))), 1),
        # Ranks that are bound to cores of their own leave the others of those.
        (4, [RankPlace(str(rank), 3, False, True) for rank in range(8)], 2),
        # Ranks of another node take nothing.
        (4, node(12, {0}) + node(12, {0}, "b"), 4),
        # Cores that are named for planners are theirs alone.
        (4, [RankPlace("a", 4, True, rank < 2) for rank in range(8)], 2),
    ],
)
def test_owners_share_the_cores_that_ranks_leave(
    wanted: int, places: list[RankPlace], expected: int
) -> None:
    assert num_planners(wanted, places, 0) == expected


def test_fewer_planners_than_wanted_are_said_once_on_a_node(
    caplog: pytest.LogCaptureFixture,
) -> None:
    places = node(12, {2, 5})
    with caplog.at_level(logging.WARNING):
        assert [num_planners(4, places, rank) for rank in (2, 5)] == [2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "planning.workers is 4, but 4 of 12 cores are left beside 8 ranks, for 2 plan owners: each "
        "starts 2 (give the job more cores, or ask for fewer)"
    ]
