"""The five models: plans against every baseline, with and without each technique.

Two kinds of batches.  ``dip``: the published models and data, drawn by seed from ``dip-vlm`` and
``dip-t2v`` (``megatron-dip problem``).  ``mixed``: the files of ``benchmarks/problems``, a mixture
of ours with other models of these names.  The partition of a model is chosen from its fit batches
(``megatron-dip partition``), and so are the cuts of the static baselines; everything is judged on
its test batches.  All schedules run in one simulator with one set of costs; no GPU is involved.  A
search is given processor time, so that what else runs on the machine does not change its result.

    python benchmarks/five_models.py               measure, keep the figures, print the tables
    python benchmarks/five_models.py --page        print them, and write docs/five_models.md
    python benchmarks/five_models.py --choose      choose the partitions anew first
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import five_models_page
import numpy as np

from megatron_dip.costs import cluster_builder, load_cluster, load_model
from megatron_dip.costs.mixtures import BUILT_IN, draw_microbatches
from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition, load_partition, uniform_partition
from megatron_dip.partitioner.choose import choose_partition
from megatron_dip.plan.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.planner.baselines import BaselineCase, StaticCuts, baselines
from megatron_dip.simulator import build_task_table, useful_work_us
from megatron_dip.simulator.bounds import heads_us, tails_us
from megatron_dip.workload import Problem, load_problem

Batches = Literal["dip", "mixed"]

ROOT = Path(__file__).parents[1]
PROBLEMS = ROOT / "benchmarks" / "problems"
PARTITIONS = {"dip": ROOT / "configs" / "partitions", "mixed": PROBLEMS / "partitions"}
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"vlm-s": 16, "vlm-m": 32, "vlm-l": 64, "t2v-s": 16, "t2v-l": 64}
"""GPUs of one replica."""
SEEDS = {"fit": (0, 1), "test": (100, 101, 102)}
UNLIMITED = 10**15
DIP, DIP_UNLIMITED = five_models_page.DIP, five_models_page.DIP_UNLIMITED
DIP_SPLIT = five_models_page.DIP_SPLIT


class Made(NamedTuple):
    """One plan."""

    utilisation: float
    of_bound: float
    """Lower bound over makespan."""
    of_plain_bound: float
    """The same of the longest chain, or the busiest rank from its first start to its last tail."""
    bound_utilisation: float
    """What a schedule at the lower bound would have."""
    peak_bytes: int
    seconds: float
    """Processor time of planning."""


@dataclass
class Found:
    """What was measured of one model, per test problem."""

    plans: dict[str, list[Made]] = field(default_factory=dict)
    baselines: dict[str, list[float]] = field(default_factory=dict)
    """Utilisation; empty where a problem cannot be run."""
    baseline_peaks: dict[str, int] = field(default_factory=dict)
    """Bytes, the most over ranks and problems."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        plans = {name: [made._asdict() for made in row] for name, row in self.plans.items()}
        return {"plans": plans, "baselines": self.baselines, "peaks": self.baseline_peaks}


Technique = Callable[[Problem, Partition], Plan]


def techniques(budget_ms: float) -> Mapping[str, Technique]:
    """Plans with and without each technique, by the name that the tables give."""

    def without_limit(problem: Problem, partition: Partition) -> Plan:
        free = (UNLIMITED,) * problem.num_ranks
        unlimited = problem.model_copy(update={"memory_limit_bytes": free})
        return make_plan(unlimited, partition, budget_ms=budget_ms)

    def one_segment(problem: Problem, partition: Partition) -> Plan:
        layers = {module.name: module.num_layers for module in problem.modules}
        even = uniform_partition(layers, dict.fromkeys(layers, 1), problem.num_ranks)
        return make_plan(problem, even, budget_ms=budget_ms)

    def whole_microbatches(problem: Problem, partition: Partition) -> Plan:
        whole = dict.fromkeys(problem.module_order)
        return make_plan(problem, partition, max_tokens=whole, budget_ms=budget_ms)

    return {
        DIP: lambda *case: make_plan(*case, budget_ms=budget_ms),
        DIP_UNLIMITED: without_limit,
        DIP_SPLIT: lambda *case: make_plan(*case, budget_ms=budget_ms, split_backward=True),
        "tree search (MCTS)": lambda *case: make_plan(*case, budget_ms=budget_ms, search="mcts"),
        "without search (dual queue)": lambda *case: make_plan(*case),
        "without partitioner (one even segment)": one_segment,
        "without sub-microbatches": whole_microbatches,
        "without memory program": lambda *case: make_plan(
            *case, budget_ms=budget_ms, memory_program=False
        ),
    }


@contextmanager
def processor_clock() -> Iterator[None]:
    """Budgets of searches are counted in time of this process, not of the wall clock."""
    with patch("time.monotonic", time.process_time):
        yield


def judge_plan(technique: Technique, problem: Problem, partition: Partition) -> Made:
    """Plan ``problem``; raises InfeasibleError where the technique finds no plan."""
    started = time.process_time()
    with processor_clock():
        plan = technique(problem, partition)
    seconds = time.process_time() - started
    assert plan.estimate is not None
    share_us = useful_work_us(problem) / problem.num_ranks
    return Made(
        utilisation=share_us / plan.estimate.makespan_us,
        of_bound=plan.estimate.lower_bound_us / plan.estimate.makespan_us,
        of_plain_bound=plain_bound_us(plan) / plan.estimate.makespan_us,
        bound_utilisation=share_us / plan.estimate.lower_bound_us,
        peak_bytes=max(plan.estimate.peak_bytes),
        seconds=seconds,
    )


def plain_bound_us(plan: Plan) -> float:
    """The longest chain, or per rank earliest start + work + shortest tail; whole backwards."""
    graph = build_task_table(plan.graph).whole
    rank = np.tile(graph.rank, 3)
    heads, tails = heads_us(graph), tails_us(graph)
    bound = float((heads + tails)[graph.exists].max())
    for tasks in (
        np.flatnonzero(graph.exists & (rank == r)) for r in range(plan.problem.num_ranks)
    ):
        busy_us = graph.duration_us[tasks]
        least_us = heads[tasks].min() + busy_us.sum() + (tails[tasks] - busy_us).min()
        bound = max(bound, float(least_us))
    return bound


def judge_model(
    batches: Batches, model: str, partition: Partition, budget_ms: float, named: Sequence[str]
) -> Found:
    """Every technique, and the ``named`` baselines, on every test problem of ``model``."""
    cuts = StaticCuts(load_problems(batches, model, "fit"))
    found = Found()
    for problem in load_problems(batches, model, "test"):
        for name, technique in techniques(budget_ms).items():
            try:
                made = [judge_plan(technique, problem, partition)]
            except InfeasibleError as error:
                print(f"{model}: {name}: {error}")
                made = []
            found.plans.setdefault(name, []).extend(made)
        case = BaselineCase.of_plan(make_plan(problem, partition), cuts)
        for baseline in baselines():
            if baseline.name not in named:
                continue
            row = found.baselines.setdefault(baseline.name, [])
            try:
                result = baseline.run(case)
            except InfeasibleError as error:
                print(f"{model}: {error}")
                continue
            row.append(result.utilisation)
            most = max(found.baseline_peaks.get(baseline.name, 0), *result.peak_bytes)
            found.baseline_peaks[baseline.name] = most
    return found


@cache
def load_problems(batches: Batches, model: str, kind: str) -> tuple[Problem, ...]:
    """The batches of ``model`` that are for ``fit`` or ``test``."""
    if batches == "mixed":
        return tuple(load_problem(path) for path in sorted(PROBLEMS.glob(f"{model}-{kind}-*.json")))
    clusters, models = ROOT / "configs" / "clusters", ROOT / "configs" / "models"
    builder = cluster_builder(
        load_model(models / f"{model.replace('-', '_')}.yaml"),
        load_cluster(clusters / f"h100_{MODELS[model]}_half_peak.yaml"),
    )
    mixture = BUILT_IN[f"dip-{model[:3]}"]
    return tuple(
        builder.build(draw_microbatches(mixture.make(), mixture.num_microbatches, seed))
        for seed in SEEDS[kind]
    )


def load_or_choose(batches: Batches, model: str, choose: bool) -> Partition:
    """The kept partition of ``model``, made anew if asked for."""
    path = PARTITIONS[batches] / f"{model.replace('-', '_')}.json"
    if not choose:
        return load_partition(path)
    fit = load_problems(batches, model, "fit")
    chosen = choose_partition(fit)
    path.write_text(chosen.partition.model_dump_json() + "\n", encoding="utf-8")
    print(f"{path.name}: {chosen.utilisation:.1%} on fit problems, {chosen.num_judged} cuts judged")
    return chosen.partition


def main() -> None:
    """Measure, print the tables, and write the page where asked to."""
    names = [baseline.name for baseline in baselines()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", default="dip", choices=("dip", "mixed"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--baselines", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--budget-ms", type=float, default=1000.0)
    parser.add_argument("--choose", action="store_true", help="choose the partitions anew")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    path = RESULTS / f"five_models_{options.batches}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for model in () if options.page else options.models:
        partition = load_or_choose(options.batches, model, options.choose)
        # Compiled functions are read from disk when they are first called: not planning's time.
        make_plan(load_problems(options.batches, model, "fit")[0], partition, evaluations=2)
        found = judge_model(options.batches, model, partition, options.budget_ms, options.baselines)
        known[model] = found.record() | {
            "date": str(datetime.now(UTC).date()),
            "budget_ms": options.budget_ms,
            "limit_bytes": load_problems(options.batches, model, "fit")[0].memory_limit_bytes[0],
        }
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        plans = known[model]["plans"][DIP]
        utilisation = statistics.mean(made["utilisation"] for made in plans)
        print(f"{model}: utilisation {utilisation:.3f}", flush=True)
    ordered = {model: known[model] for model in MODELS if model in known}
    print(five_models_page.section(options.batches, ordered))
    if options.page:
        five_models_page.write(options.batches, ordered)


if __name__ == "__main__":
    main()
