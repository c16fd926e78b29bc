"""Many replicas: what assignment gains, what plans gain, and what both do together.

Every replica has a batch of its own, drawn as at the published point (``docs/workloads.md``); a
step takes what the slowest replica takes, and the reduction of gradients that nothing overlaps.
Four ways: neither, assignment alone, plans alone, both.  Simulated with one set of costs; no GPU is
involved.

    python benchmarks/replicas.py vlm_s t2v_s -o results.json    measure
    python benchmarks/replicas.py --draw results.json ...        the table, and docs/replicas.svg

All replicas are drawn and assigned.  Schedules are made for some, see ``Batches.to_run``: the
slowest replica is the slowest of these; work of all counts in the utilisation.  Measuring again
into the same file adds what is not in it: a run that was broken off goes on, and plans are made
anew where the partition or the number of evaluations is another.

Without plans the schedule is interleaved 1F1B.  Its cut is the best that ``StaticCuts`` finds in
this simulator, once per model, on two batches that no step has; for assigned batches on the same
two with their microbatches evened out.  Where memory is limited, every piece recomputes as many
layers as the batch needs; of the cuts found with and without the limit, the one is used that is
faster on the replicas with most work.

Reductions: gradients in 4 bytes a weight, scattered in a ring over the replicas at the rate of a
rank's transfers.  A rank reduces what is ready while it computes; the gradients of its largest
stage (piece) are taken to be ready last and to overlap with nothing.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from replicas_batches import Batches
from replicas_picture import WAYS, draw_replicas, table_of

from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition, load_partition
from megatron_dip.planner import make_plan
from megatron_dip.planner.baselines import (
    FlatChain,
    StaticCut,
    StaticCuts,
    StaticSimulator,
    run_within_memory,
)
from megatron_dip.workload import Problem

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "replicas.svg"
CLUSTERS = {"vlm_s": 16, "vlm_m": 32, "vlm_l": 64, "t2v_s": 16, "t2v_l": 64}
FIRST_SEED = 1000
FIT_SEEDS = (0, 1)
UNLIMITED = 10**15
BYTES_PER_WEIGHT, GRADIENT_BYTES = 6, 4
"""Of static bytes in these clusters, and of them the gradient."""
CELL = ("model", "replicas", "batches", "schedule", "limit")
"""What tells rows of results from one another."""


class How(NamedTuple):
    """A batch is scheduled."""

    schedule: str
    """``static`` or ``planned``."""
    limit: bool


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


def static_us(problem: Problem, cut: StaticCut) -> float:
    """Under the interleaved schedule; infinite where that cannot keep the limit."""
    try:
        return run_within_memory(StaticSimulator(FlatChain(problem)), cut).makespan_us
    except InfeasibleError:
        return math.inf


def planned_us(problem: Problem, partition: Partition, evaluations: int) -> float:
    """Of a plan; infinite where none keeps the limit."""
    try:
        plan = make_plan(problem, partition, evaluations=evaluations)
    except InfeasibleError:
        return math.inf
    assert plan.estimate is not None
    return plan.estimate.makespan_us


class Replicas:
    """Of one model, at most ``most``."""

    def __init__(
        self,
        model: str,
        partition: Path,
        evaluations: int,
        most: int,
        known: Sequence[Mapping[str, Any]],
    ) -> None:
        self.model, self._evaluations = model, evaluations
        self._cluster = f"h100_{CLUSTERS[model]}_half_peak"
        self._partition = load_partition(partition)
        self._digest = hashlib.sha256(partition.read_bytes()).hexdigest()[:12]
        self._seeds = range(FIRST_SEED, FIRST_SEED + most)
        # Fitted once: a cut of a known row is used again.
        self._cuts: dict[tuple[bool, bool], StaticCut] = {}
        num_ranks = 1 + max(stage.rank for stage in self._partition.stages)
        for row in known:
            if row["model"] == model and "cut" in row:
                cut = StaticCut(num_ranks=num_ranks, num_layers=tuple(row["cut"]))
                self._cuts[row["batches"] == "assigned", row["limit"]] = cut
        self._as_given: dict[int, dict[How, float | None]] = {}
        """Times by replica."""

    def key(self, count: int, batches: str, how: How) -> dict[str, Any]:
        """What a row of results begins with; nothing else changes its times."""
        key = {"model": self.model, "replicas": count, "batches": batches, **how._asdict()}
        if how.schedule == "planned":
            key |= {"partition": self._digest, "evaluations": self._evaluations}
        return key

    def batches(self, count: int, kind: str) -> Batches:
        """Of the first replicas."""
        given = self._drawn.first(count)
        return given if kind == "as given" else given.assigned(within=kind == "assigned")

    def times_us(self, batches: Batches, hows: Sequence[How]) -> dict[How, list[float | None]]:
        """Of the replicas that are run; None where one cannot keep the limit."""
        times: dict[How, list[float | None]] = {how: [] for how in hows}
        for replica in batches.to_run:
            # What stays as it was drawn is the same among more replicas and among fewer.
            known = self._as_given.setdefault(replica, {}) if batches.moved is None else {}
            if missing := [how for how in hows if how not in known]:
                problem = batches.problem(replica)
                known.update({how: self._time_us(batches, problem, how) for how in missing})
            for how in hows:
                times[how].append(known[how])
        return times

    def step(self, batches: Batches, how: How, times_us: Sequence[float | None]) -> dict[str, Any]:
        """Of all replicas; without figures where one of them cannot keep the limit."""
        work_us = batches.work_us
        step: dict[str, Any] = {
            "moved": batches.moved,
            "most_work_over_mean": float(work_us.max() / work_us.mean()),
            "run": batches.to_run,
            "times_us": times_us,
        }
        problem = self._fits[False][0]
        if how.schedule == "static":
            cut = self._cut(batches, how.limit)
            step["cut"] = cut.num_layers
            largest_bytes = largest_piece(problem, cut)
        else:
            largest_bytes = largest_stage(problem, self._partition)
        known_us = [time_us for time_us in times_us if time_us is not None]
        if len(known_us) < len(times_us):
            return step
        ring = (batches.num_replicas - 1) / batches.num_replicas
        reduce_us = ring * largest_bytes / problem.transfer.bytes_per_us
        ranks_us = batches.num_replicas * problem.num_ranks * (max(known_us) + reduce_us)
        return step | {
            "slowest_us": max(known_us),
            "mean_us": statistics.mean(known_us[: len(batches.spread)]),
            "reduce_us": reduce_us,
            "utilisation": float(work_us.sum()) / ranks_us,
        }

    @cached_property
    def _drawn(self) -> Batches:
        """All of them, as given."""
        return Batches.draw(ROOT, self.model, self._cluster, self._seeds)

    @cached_property
    def _fits(self) -> Mapping[bool, list[Problem]]:
        """By whether their microbatches are evened out."""
        drawn = [Batches.draw(ROOT, self.model, self._cluster, [seed]) for seed in FIT_SEEDS]
        return {
            False: [batches.problem(0) for batches in drawn],
            True: [batches.assigned(within=True).problem(0) for batches in drawn],
        }

    def _cut(self, batches: Batches, has_limit: bool) -> StaticCut:
        key = batches.within, has_limit
        if key not in self._cuts:
            cuts = StaticCuts(self._fits[batches.within])
            cut = cuts.interleaved
            if has_limit:
                problems = [batches.problem(replica) for replica in batches.heaviest]
                cut = min(
                    (cut, cuts.interleaved_within_memory),
                    key=lambda cut: max(static_us(problem, cut) for problem in problems),
                )
            self._cuts[key] = cut
        return self._cuts[key]

    def _time_us(self, batches: Batches, problem: Problem, how: How) -> float | None:
        if not how.limit:
            free = (UNLIMITED,) * problem.num_ranks
            problem = problem.model_copy(update={"memory_limit_bytes": free})
        if how.schedule == "static":
            time_us = static_us(problem, self._cut(batches, how.limit))
        else:
            time_us = planned_us(problem, self._partition, self._evaluations)
        return round(time_us, 1) if math.isfinite(time_us) else None


def measure(
    replicas: Replicas, count: int, limits: Sequence[bool], known: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Of ``count`` replicas every way that is not ``known``, with the memory limit or without."""
    for kind in ("as given", "assigned", "whole microbatches")[: 2 + (count > 1)]:
        schedules = [schedule for schedule, batches in WAYS.values() if batches == kind]
        hows = [How(schedule, limit) for schedule in schedules for limit in limits]
        keys = {how: replicas.key(count, kind, how) for how in hows}
        missing = [
            how for how in hows if not any(keys[how].items() <= row.items() for row in known)
        ]
        if missing:
            batches = replicas.batches(count, kind)
            for how, times_us in replicas.times_us(batches, missing).items():
                yield {**keys[how], **replicas.step(batches, how, times_us)}


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {list(CLUSTERS)}")
    parser.add_argument("--output", "-o", type=Path, default=ROOT / "runs" / "replicas.json")
    parser.add_argument("--draw", type=Path, nargs="+", help="results; measures nothing")
    parser.add_argument("--partitions", type=Path, default=ROOT / "configs" / "partitions")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--evaluations", type=int, default=40, help="per plan")
    parser.add_argument("--limited", action="store_true", help="not without the memory limit")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.models) - set(CLUSTERS))
    if unknown or bool(arguments.models) == (arguments.draw is not None):
        parser.error(f"expected models of {list(CLUSTERS)}, or --draw (unknown: {unknown})")
    if arguments.draw is not None:
        rows = [row for path in arguments.draw for row in json.loads(path.read_text())["rows"]]
        print(table_of(rows))
        PICTURE.write_text(draw_replicas(rows))
        return
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    most = max(arguments.replicas)
    limits = (True,) if arguments.limited else (True, False)
    for model in arguments.models:
        partition = arguments.partitions / f"{model}.json"
        replicas = Replicas(model, partition, arguments.evaluations, most, rows)
        for count in sorted(arguments.replicas, reverse=True):
            started = time.process_time()
            for row in measure(replicas, count, limits, rows):
                rows = [*(other for other in rows if not is_same(other, row)), row]
                write_rows(output, rows)
                print([row[name] for name in CELL], row.get("utilisation"), flush=True)
            seconds = time.process_time() - started
            print(f"{model}, {count} replicas: {seconds:.0f} s of processor time", flush=True)


def is_same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether they are of one cell, whatever it was measured with."""
    return all(row[name] == other[name] for name in CELL)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON, a line each."""
    date = datetime.now(UTC).date().isoformat()
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f'{{"date": "{date}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
