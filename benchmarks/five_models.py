"""The five models: plans against every baseline, with and without each technique.

The partition of a model is chosen from its ``*-fit-*.json`` (``megatron-dip partition``, kept in
``configs/partitions``), and so are the cuts of the static baselines; everything is judged on its
``*-test-*.json``.  All schedules run in one simulator with one set of costs; no GPU is involved.

    python benchmarks/five_models.py               print the tables
    python benchmarks/five_models.py --write       and write docs/five_models.md with them
    python benchmarks/five_models.py --choose      choose the partitions anew first
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition, load_partition, uniform_partition
from megatron_dip.partitioner.choose import choose_partition
from megatron_dip.plan.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.planner.baselines import BaselineCase, StaticCuts, baselines
from megatron_dip.simulator import build_task_table, useful_work_us
from megatron_dip.simulator.bounds import heads_us, tails_us
from megatron_dip.workload import Problem, load_problem

ROOT = Path(__file__).parents[1]
PROBLEMS = ROOT / "benchmarks" / "problems"
PARTITIONS = ROOT / "configs" / "partitions"
DOCUMENT = ROOT / "docs" / "five_models.md"
MODELS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")
ONE_F_ONE_B = ("1f1b", "1f1b-stock")
INTERLEAVED = ("interleaved", "interleaved-stock")
UNLIMITED = 10**15
CHOOSING_MINUTES = 10.0
DIP, DIP_UNLIMITED = "DIP", "DIP, no memory limit"
DIP_SPLIT = "DIP, split backward"


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

    def mean(self, technique: str, value: Callable[[Made], float]) -> float:
        return statistics.mean(map(value, self.plans[technique]))

    def gain(self, names: Sequence[str], technique: str = DIP) -> float:
        """Mean throughput over the best of ``names``: the one that is best on average."""
        known = [name for name in names if self.baselines[name]]
        best = max(known, key=lambda name: statistics.mean(self.baselines[name]))
        ratios = zip(self.plans[technique], self.baselines[best], strict=True)
        return statistics.mean(made.utilisation / other for made, other in ratios)


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


def judge_plan(technique: Technique, problem: Problem, partition: Partition) -> Made:
    """Plan ``problem``; raises InfeasibleError where the technique finds no plan."""
    started = time.thread_time()
    plan = technique(problem, partition)
    seconds = time.thread_time() - started
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


def judge_model(model: str, partition: Partition, budget_ms: float) -> Found:
    """Every technique and baseline on every test problem of ``model``."""
    cuts = StaticCuts(load_problems(model, "fit"))
    found = Found()
    for problem in load_problems(model, "test"):
        for name, technique in techniques(budget_ms).items():
            try:
                made = [judge_plan(technique, problem, partition)]
            except InfeasibleError as error:
                print(f"{model}: {name}: {error}")
                made = []
            found.plans.setdefault(name, []).extend(made)
        case = BaselineCase.of_plan(make_plan(problem, partition), cuts)
        for baseline in baselines():
            row = found.baselines.setdefault(baseline.name, [])
            try:
                row.append(baseline.run(case).utilisation)
            except InfeasibleError as error:
                print(f"{model}: {error}")
    return found


def load_problems(model: str, kind: str) -> list[Problem]:
    """The sample problems of ``model`` that are for ``fit`` or ``test``."""
    return [load_problem(path) for path in sorted(PROBLEMS.glob(f"{model}-{kind}-*.json"))]


def load_or_choose(model: str, choose: bool) -> Partition:
    """The kept partition of ``model``, made anew if asked for."""
    path = PARTITIONS / f"{model.replace('-', '_')}.json"
    if not choose:
        return load_partition(path)
    chosen = choose_partition(load_problems(model, "fit"), minutes=CHOOSING_MINUTES)
    path.write_text(chosen.partition.model_dump_json() + "\n", encoding="utf-8")
    print(f"{path.name}: {chosen.utilisation:.1%} on fit problems, {chosen.num_judged} cuts judged")
    return chosen.partition


def headline(found: Mapping[str, Found]) -> str:
    """What is asked of a schedule first."""
    everything = [name for name in next(iter(found.values())).baselines if "without" not in name]

    def row(title: str, value: Callable[[Found], str]) -> list[str]:
        return [title, *(value(model) for model in found.values())]

    def mean(title: str, technique: str, value: Callable[[Made], float]) -> list[str]:
        return row(title, lambda model: f"{model.mean(technique, value):.3f}")

    return markdown(
        ["", *(model.upper() for model in found)],
        [
            mean("utilisation", DIP, lambda made: made.utilisation),
            mean("ratio to the lower bound", DIP, lambda made: made.of_bound),
            mean("the same without memory limit", DIP_UNLIMITED, lambda made: made.of_bound),
            mean("ratio to the plain bound", DIP, lambda made: made.of_plain_bound),
            mean("the same without memory limit", DIP_UNLIMITED, lambda made: made.of_plain_bound),
            mean("utilisation at the lower bound", DIP, lambda made: made.bound_utilisation),
            mean("utilisation, split backward", DIP_SPLIT, lambda made: made.utilisation),
            mean("its ratio to the lower bound", DIP_SPLIT, lambda made: made.of_bound),
            row("throughput over 1F1B", lambda model: f"{model.gain(ONE_F_ONE_B):.2f}"),
            row("over interleaved 1F1B", lambda model: f"{model.gain(INTERLEAVED):.2f}"),
            row("over the best baseline of all", lambda model: f"{model.gain(everything):.2f}"),
            row(
                "peak memory, GB", lambda m: f"{max(x.peak_bytes for x in m.plans[DIP]) / 1e9:.0f}"
            ),
            row("planning, s", lambda model: f"{model.mean(DIP, lambda made: made.seconds):.2f}"),
        ],
    )


def over_baselines(found: Mapping[str, Found]) -> str:
    """Throughput of plans over every baseline."""
    names = next(iter(found.values())).baselines
    rows = [
        [
            f"`{name}`",
            *(f"{m.gain([name]):.2f}" if m.baselines[name] else "-" for m in found.values()),
        ]
        for name in names
    ]
    return markdown(["plans are faster by", *(model.upper() for model in found)], rows)


def with_and_without(found: Mapping[str, Found]) -> str:
    """Utilisation with and without every technique."""
    names = next(iter(found.values())).plans
    rows = [
        [
            name,
            *(
                f"{m.mean(name, lambda made: made.utilisation):.3f}" if m.plans[name] else "-"
                for m in found.values()
            ),
        ]
        for name in names
    ]
    return markdown(["utilisation", *(model.upper() for model in found)], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXT = """# The five models

Simulated, on the sample batches of [`benchmarks/problems`](../benchmarks/problems/README.md):
partitions and static cuts are chosen on the fit batches and judged on the test batches, means over
{num_tests} of them, {limit:.0f} GB per rank. {budget_ms:.0f} ms of search per plan on one core,
after which the plan is lowered and validated (Python {python}, {date}). Made by
`python benchmarks/five_models.py --write`; the partitions are in `configs/partitions`.

*Utilisation* is useful work, without overheads and recomputation, over ranks x makespan. No
schedule of the same partition and sub-microbatches can beat either bound. The *plain* one is the
longest chain of dependencies, or per rank earliest start + work + shortest tail. The *lower bound*
is never below it: for every rank, what it takes if it may interrupt its actions and waits for no
other rank (the preemptive one-machine relaxation). Backwards are whole unless it says split.

{headline}

A video clip cannot be split: its forwards and backwards follow one another through all layers. The
longest clip of a text-to-video batch can take longer from end to end than a rank's share of the
whole batch. Then no schedule with whole backwards comes near full utilisation, as *utilisation at
the lower bound* shows. With split backwards the weight gradients leave that chain.

## Against every baseline

What each is, and where it is generous, stands in [baselines.md](baselines.md). Static schedules
ignore the memory limit unless they say `-recompute`.

{over_baselines}

## With and without each technique

{with_and_without}
"""


def main() -> None:
    """Print the tables, and write them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--budget-ms", type=float, default=1000.0)
    parser.add_argument("--choose", action="store_true", help="choose the partitions anew")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    found = {}
    for model in options.models:
        partition = load_or_choose(model, options.choose)
        # Compiled functions are read from disk when they are first called: not planning's time.
        make_plan(load_problems(model, "fit")[0], partition, evaluations=2)
        found[model] = judge_model(model, partition, options.budget_ms)
        print(headline({model: found[model]}))
    problems = load_problems(options.models[0], "test")
    text = TEXT.format(
        num_tests=len(problems),
        limit=problems[0].memory_limit_bytes[0] / 1e9,
        budget_ms=options.budget_ms,
        python=platform.python_version(),
        date=datetime.now(UTC).date(),
        headline=headline(found),
        over_baselines=over_baselines(found),
        with_and_without=with_and_without(found),
    )
    print(text)
    if options.write:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
