"""How many planner processes a pipeline gets: as many as wanted, as far as cores are left.

Plan owners sit where their pipelines begin.  With 8 GPUs to a node and tensor parallelism of 8 one
node in so many as there are pipeline ranks has one owner; without tensor parallelism the nodes of
the first stages have eight each, and the others none.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["RankPlace", "num_planners"]

logger = logging.getLogger(__name__)


class RankPlace(NamedTuple):
    """Where a rank, or its planners, may run."""

    name: str
    """Of a node and a set of its cores; equal where two ranks share them."""
    num_cores: int
    is_for_planners: bool
    """Whether no rank runs on these cores."""
    is_owner: bool
    """Whether the rank has planners."""


def num_planners(wanted: int, places: Sequence[RankPlace], rank: int) -> int:
    """Planner processes of the plan owner ``rank``, at least one.

    Every rank on the same cores takes one, and owners share the rest evenly.  A single planner is
    started in any case: it is niced, and a run without planners would wait for every plan.

    Args:
        wanted: ``planning.workers``.
        places: Of all ranks, in their order.
        rank: A plan owner.
    """
    own = places[rank]
    sharing = [number for number, place in enumerate(places) if place.name == own.name]
    owners = [number for number in sharing if places[number].is_owner]
    num_taken = 0 if own.is_for_planners else len(sharing)
    num_left = max(0, own.num_cores - num_taken)
    found = max(1, min(wanted, num_left // len(owners)))
    if found < wanted and rank == owners[0]:
        logger.warning(
            "planning.workers is %d, but %d of %d cores are left beside %d ranks, for %d plan "
            "owners: each starts %d (give the job more cores, or ask for fewer)",
            wanted,
            num_left,
            own.num_cores,
            num_taken,
            len(owners),
            found,
        )
    return found
