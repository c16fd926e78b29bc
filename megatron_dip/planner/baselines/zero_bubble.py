"""Zero-bubble pipeline: weight gradients wait for the moments in which a rank would idle.

After ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): forwards and input
gradients in the order of 1F1B on the same cut, and on every rank at most as many microbatches
between forward and weight gradient as 1F1B holds on its first rank, which is the number of ranks.
With equal pieces it takes M (F + I + W) + (P - 1) (F + I - W).  The published schedule is made
once, from mean times; this one is made anew for every batch, from the true times: generous.
"""

import numpy as np

from megatron_dip.planner.baselines.filling import InFlightLimit, fill_gaps
from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.megatron_orders import one_f_one_b_order
from megatron_dip.planner.baselines.static import StaticRun, finish_run, make_graph

__all__ = ["run_zero_bubble"]


def run_zero_bubble(chain: FlatChain, cut: StaticCut) -> StaticRun:
    """Simulate ``cut``, which has one piece per rank, with split backwards."""
    assert cut.num_virtual == 1, "zero-bubble runs on the cut of 1F1B"
    costs = chain.costs(cut)
    graph = make_graph(chain, cut, costs)
    num_microbatches = chain.problem.num_microbatches
    num_works = len(graph.rank)
    fixed = []
    for rank in range(cut.num_ranks):
        steps = one_f_one_b_order(cut.num_ranks, num_microbatches, rank)
        tasks = [
            rank * num_microbatches + step.microbatch + num_works * step.is_backward
            for step in steps
        ]
        fixed.append([task for task in tasks if graph.exists[task]])
    # Weight gradients in the order of their microbatches.
    key = np.arange(len(graph.exists)) % num_microbatches
    # What has no weight gradient is held no longer than in 1F1B.
    has_weight_task = graph.exists[2 * num_works :]
    holder = np.where(has_weight_task, np.arange(num_works), -1)
    limit = InFlightLimit(holder, pool=graph.rank, max_held=cut.num_ranks)
    order = fill_gaps(graph, fixed, key, limit)
    return finish_run(chain, cut, 0, costs, graph, order)
