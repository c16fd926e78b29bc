"""Whether ranks that wait for one another come to their end, whatever anything takes.

NCCL makes a communicator at its first transfer and holds the host until its other end comes to its
own.  Lists with receives ahead of their data can come to rest so.  A run therefore opens its
channels at set-up; :func:`hosts_meet` says what would happen to a plan without that.
"""

import numpy as np

from megatron_dip.compiled import compiled
from megatron_dip.plan.queues import ActionLists, list_kernels
from megatron_dip.plan.wiring import IntArray, Wiring

__all__ = ["hosts_meet", "run_to_the_end"]


def hosts_meet(wiring: Wiring, lists: ActionLists, num_communicators: int) -> bool:
    """Whether all hosts issue their lists though each waits at the first transfer of every
    communicator for the host at its other end."""
    kernels = list_kernels(wiring, lists, num_communicators)
    is_first = (kernels.other_side >= 0) & (kernels.before < 0)
    heads = lists.first[:-1].copy()
    run_to_the_end(lists.first, lists.rank, np.where(is_first, kernels.other_side, -1), heads)
    return bool((heads == lists.first[1:]).all())


@compiled
def run_to_the_end(first: IntArray, rank: IntArray, other_side: IntArray, heads: IntArray) -> None:
    """Advance ``heads``, the next action of every rank, until nothing can run any more.

    Args:
        first: [num_ranks + 1]: rank r has the actions first[r] to first[r + 1].
        rank: [T] of every action.
        other_side: [T]: the receive of a send and vice versa, -1 for what waits for nothing.
        heads: [num_ranks]
    """
    has_moved = True
    while has_moved:
        has_moved = False
        for number in range(len(heads)):
            while heads[number] < first[number + 1]:
                other = other_side[heads[number]]
                if other >= 0:
                    if heads[rank[other]] != other:
                        break
                    heads[rank[other]] += 1
                heads[number] += 1
                has_moved = True
