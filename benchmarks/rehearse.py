"""Rehearsed against predicted makespan: the real executor and transfers, computing by sleeping.

Reads one test problem of every model in a folder (``<model>-test-0.json``), repeats its
microbatches until every rank has 1000 actions, cuts and plans it as ``planner_speed.py`` does, and
scales times so that three of four compute actions take 2 ms or more.  Transfers are scaled to a
hundredth, which loopback carries.  Ranks ask for real-time priority; where they do not get it,
other programs disturb.

    python benchmarks/rehearse.py PROBLEM_FOLDER [--ranks 4 8] [--repetitions 3] [-o RESULTS.json]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from planner_speed import MAX_TOKENS, resized
from rich.console import Console
from rich.table import Table

from megatron_dip.partition import partition_from_layers
from megatron_dip.partitioner.cuts import balanced_counts, spread_layers
from megatron_dip.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.rehearsal import rehearsal_json, rehearse
from megatron_dip.simulator import simulate
from megatron_dip.workload import Problem, load_problem

MIN_ACTIONS = 1000
LOWER_QUARTILE_US = 2000.0
TRANSFER_SCALE = 0.01


def plan_batch(problem: Problem, num_ranks: int, num_microbatches: int) -> Plan:
    """2 segments for every module but the last, 4 for the last."""
    batch = resized(problem, num_ranks, num_microbatches)
    last = batch.module_order[-1]
    counts = balanced_counts([batch], is_joint=False)
    cuts = {
        name: spread_layers(counts[name], 4 if name == last else 2) for name in batch.module_order
    }
    return make_plan(
        batch,
        partition_from_layers(cuts, num_ranks),
        max_tokens=dict.fromkeys(batch.module_order, MAX_TOKENS),
        evaluations=64,
    )


def long_plan(problem: Problem, num_ranks: int) -> Plan:
    """A plan with at least ``MIN_ACTIONS`` actions on every rank."""
    step = num_microbatches = problem.num_microbatches
    while True:
        plan = plan_batch(problem, num_ranks, num_microbatches)
        if min(map(len, plan.actions)) >= MIN_ACTIONS:
            return plan
        num_microbatches += step // 2


def rehearse_model(name: str, problem: Problem, num_ranks: int, repetitions: int) -> dict[str, Any]:
    """One row of the table."""
    plan = long_plan(problem, num_ranks)
    times = [t.end_us - t.start_us for line in simulate(plan).timelines for t in line]
    time_scale = LOWER_QUARTILE_US / statistics.quantiles(times)[0]
    found = rehearse(
        plan, time_scale=time_scale, transfer_scale=TRANSFER_SCALE, repetitions=repetitions
    )
    return {
        "model": name,
        "num_ranks": num_ranks,
        "num_microbatches": plan.problem.num_microbatches,
        "min_actions": min(map(len, plan.actions)),
        "time_scale": time_scale,
        "transfer_scale": TRANSFER_SCALE,
        **rehearsal_json(found),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with *-test-0.json problems")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="where the numbers go (JSON)")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.glob("*-test-0.json"))
    if not paths:
        parser.error(f"{arguments.folder} holds no *-test-0.json problems")
    table = Table("model", "ranks", "actions per rank", "time scale", "predicted", "achieved", "")
    rows = []
    for path in paths:
        for num_ranks in arguments.ranks:
            name = path.stem.removesuffix("-test-0")
            row = rehearse_model(name, load_problem(path), num_ranks, arguments.repetitions)
            rows.append(row)
            table.add_row(
                name,
                str(num_ranks),
                str(row["min_actions"]),
                f"{row['time_scale']:.2f}",
                f"{row['predicted_us'] / 1e6:.3f} s",
                f"{row['achieved_us'] / 1e6:.3f} s",
                f"{row['ratio'] - 1:+.2%}",
            )
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
