"""Many replicas: what assignment gains, what plans gain, and what both do together.

Every replica has a batch of its own, drawn as at the published point (``docs/workloads.md``); a
step takes what the slowest replica takes, and the reduction of gradients that nothing overlaps.
Four ways: neither, assignment alone, plans alone, both; without plans the schedule is interleaved
1F1B with a cut fitted on one batch of the same kind, assigned where those that it is judged on are.
Simulated with one set of costs; no GPU is involved.

    python benchmarks/replicas.py vlm_s t2v_s -o results.json    measure
    python benchmarks/replicas.py --draw results.json ...        the table, and docs/replicas.svg

All replicas are drawn and assigned.  Schedules are made for some: for the replicas with most work,
one in the middle and the one with least, see ``RUN``; the slowest is the slowest of these, and work
of all counts in the utilisation.  Where memory is limited, a static schedule recomputes in every
piece as many layers as its batch needs.

Reductions: gradients in 4 bytes a weight, scattered in a ring over the replicas at the rate of a
rank's transfers.  A rank reduces what is ready while it computes; the gradients of its largest
stage (piece) are taken to be ready last and to overlap with nothing.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from replicas_batches import Batches
from replicas_picture import draw_replicas, table_of

from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition, load_partition
from megatron_dip.planner import make_plan
from megatron_dip.planner.baselines import FlatChain, StaticCut, StaticCuts, run_within_memory
from megatron_dip.planner.baselines.cuts import MAX_VIRTUAL, balanced_layers
from megatron_dip.planner.baselines.static import StaticSimulator
from megatron_dip.workload import Problem

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "replicas.svg"
CLUSTERS = {"vlm_s": 16, "vlm_m": 32, "vlm_l": 64, "t2v_s": 16, "t2v_l": 64}
FIRST_SEED = 1000
FIT_SEED = 0
UNLIMITED = 10**15
BYTES_PER_WEIGHT, GRADIENT_BYTES = 6, 4
"""Of static bytes in these clusters, and of them the gradient."""


def limited(problem: Problem, has_limit: bool) -> Problem:
    """``problem`` with its own memory limit, or without one."""
    if has_limit:
        return problem
    free = (UNLIMITED,) * problem.num_ranks
    return problem.model_copy(update={"memory_limit_bytes": free})


def gradient_bytes(problem: Problem, name: str, layers: range) -> int:
    """Of consecutive layers of a module, with the extras at its ends."""
    module = problem.module(name)
    static = module.layer_static_bytes * module.num_trained(layers)
    if 0 in layers and module.trains_first_extra:
        static += module.first_layer_extra.static_bytes
    if module.num_layers - 1 in layers and module.trains_last_extra:
        static += module.last_layer_extra.static_bytes
    return static * GRADIENT_BYTES // BYTES_PER_WEIGHT


def largest_piece(problem: Problem, cut: StaticCut) -> int:
    """Gradient bytes of the largest piece of the flat chain."""
    ends = np.cumsum((0, *cut.num_layers)).tolist()
    start = 0
    pieces = [0] * len(cut.num_layers)
    for name in problem.module_order:
        stop = start + problem.module(name).num_layers
        for piece, (first, end) in enumerate(pairwise(ends)):
            layers = range(max(first, start) - start, max(0, min(end, stop) - start))
            pieces[piece] += gradient_bytes(problem, name, layers)
        start = stop
    return max(pieces)


def largest_stage(problem: Problem, partition: Partition) -> int:
    """The same of the stages of a partition."""
    return max(gradient_bytes(problem, stage.module, stage.layers) for stage in partition.stages)


def quick_cut(problem: Problem) -> StaticCut:
    """Pieces of equal mean work, in the best number of them; then layers move between neighbours
    as long as that shortens the batch."""
    chain = FlatChain(problem)
    simulator, ranks = StaticSimulator(chain), problem.num_ranks

    def makespan_us(layers: Sequence[int]) -> float:
        return simulator.makespan_us(StaticCut(num_ranks=ranks, num_layers=tuple(layers)))

    until_us = (chain.forward_until_us + chain.backward_until_us).mean(axis=1)
    most = min(MAX_VIRTUAL, chain.num_layers // ranks)
    starts = [balanced_layers(np.diff(until_us), count * ranks) for count in range(2, most + 1)]
    best = list(min(starts, key=makespan_us))
    best_us, is_better = makespan_us(best), True
    while is_better:
        is_better = False
        for piece in range(len(best) - 1):
            for giver, taker in ((piece, piece + 1), (piece + 1, piece)):
                tried = list(best)
                tried[giver] -= 1
                tried[taker] += 1
                if tried[giver] and (tried_us := makespan_us(tried)) < best_us:
                    best, best_us, is_better = tried, tried_us, True
    return StaticCut(num_ranks=ranks, num_layers=tuple(best))


def static_us(problem: Problem, cut: StaticCut, has_limit: bool) -> float:
    """Under the interleaved schedule; infinite where that cannot keep the limit."""
    chain = FlatChain(limited(problem, has_limit))
    try:
        run = run_within_memory(chain, cut) if has_limit else StaticSimulator(chain).run(cut)
    except InfeasibleError:
        return math.inf
    return run.makespan_us


def planned_us(problem: Problem, partition: Partition, has_limit: bool, evaluations: int) -> float:
    """Of a plan."""
    plan = make_plan(limited(problem, has_limit), partition, evaluations=evaluations)
    assert plan.estimate is not None
    return plan.estimate.makespan_us


def step_of(
    batches: Batches, problem: Problem, times_us: Sequence[float], largest_bytes: int
) -> dict[str, Any]:
    """A step of all replicas: the slowest of those that were run, and what reduction is left."""
    ring = (batches.num_replicas - 1) / batches.num_replicas
    reduce_us = ring * largest_bytes / problem.transfer.bytes_per_us
    slowest_us = max(times_us)
    ranks = batches.num_replicas * problem.num_ranks
    return {
        "slowest_us": slowest_us,
        "mean_us": statistics.mean(times_us),
        "reduce_us": reduce_us,
        "utilisation": float(batches.work_us.sum()) / (ranks * (slowest_us + reduce_us)),
        "most_work_over_mean": float(batches.work_us.max() / batches.work_us.mean()),
        "times_us": list(times_us),
    }


def measure(
    model: str, partition: Partition, counts: Sequence[int], evaluations: int, best_cuts: bool
) -> Iterator[dict[str, Any]]:
    """Every number of replicas, way and limit."""
    cluster = f"h100_{CLUSTERS[model]}_half_peak"
    fit = Batches.draw(ROOT, model, cluster, [FIT_SEED])
    fits = [fit.problem(0), fit.assigned(within=True).problem(0)]
    if best_cuts:
        cuts = [StaticCuts([problem]).interleaved for problem in fits]
    else:
        cuts = [quick_cut(problem) for problem in fits]
    stage_bytes = largest_stage(fits[0], partition)
    drawn = Batches.draw(ROOT, model, cluster, range(FIRST_SEED, FIRST_SEED + max(counts)))
    for count in counts:
        given = drawn.first(count)
        ways = {"as given": given, "assigned": given.assigned(within=True)}
        if count > 1:
            ways["whole microbatches"] = given.assigned(within=False)
        for way, batches in ways.items():
            problems = batches.problems_to_run()
            cut = cuts[way == "assigned"]
            for has_limit in (True, False):
                row: Mapping[str, Any] = {
                    "model": model,
                    "replicas": count,
                    "batches": way,
                    "limit": has_limit,
                    "moved": batches.moved,
                }
                times_us = [static_us(problem, cut, has_limit) for problem in problems]
                if math.isfinite(max(times_us)):
                    step = step_of(batches, fits[0], times_us, largest_piece(fits[0], cut))
                    yield {**row, "schedule": "static", **step}
                started = time.thread_time()
                times_us = [
                    planned_us(problem, partition, has_limit, evaluations) for problem in problems
                ]
                seconds = (time.thread_time() - started) / len(problems)
                step = step_of(batches, fits[0], times_us, stage_bytes)
                yield {**row, "schedule": "planned", **step, "seconds_per_plan": seconds}


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {list(CLUSTERS)}")
    parser.add_argument("--output", "-o", type=Path, default=ROOT / "runs" / "replicas.json")
    parser.add_argument("--draw", type=Path, nargs="+", help="results; measures nothing")
    parser.add_argument("--partitions", type=Path, default=ROOT / "configs" / "partitions")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--evaluations", type=int, default=60, help="per plan")
    parser.add_argument("--best-cuts", action="store_true", help="of static schedules: minutes")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - set(CLUSTERS))
    if unknown or bool(arguments.models) == (arguments.draw is not None):
        parser.error(f"expected models of {list(CLUSTERS)}, or --draw (unknown: {unknown})")
    if arguments.draw is not None:
        rows = [row for path in arguments.draw for row in json.loads(path.read_text())["rows"]]
        print(table_of(rows))
        PICTURE.write_text(draw_replicas(rows))
        return
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "evaluations": arguments.evaluations,
        "static cuts": "best" if arguments.best_cuts else "quick",
        "rows": [],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        partition = load_partition(arguments.partitions / f"{model}.json")
        for row in measure(
            model, partition, arguments.replicas, arguments.evaluations, arguments.best_cuts
        ):
            results["rows"].append(row)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
            print({name: value for name, value in row.items() if name != "times_us"}, flush=True)


if __name__ == "__main__":
    main()
