"""Planning beside training: what it costs, what it gains, and what becomes of killed planners.

    .venv/bin/python benchmarks/plan_service.py [--iterations 200] [--pairs 3] [--kills 50]

Trains the model of ``configs/vlm_tiny.yaml`` on the same varying batches, with a core for every
rank as far as there are cores, and prints and writes as JSON:

- waits: on two and on four pipeline ranks, what training waited for plans; the first step has none
  before it, and the second one shares it with the start of the planner process;
- overload: a search that never ends by itself, more than a step long: what training waited at most,
  and how often it used a lesser plan;
- throughput: plans searched for every batch against two static ones, on the same stages, executor
  and batches: one plan searched for the largest items of all batches of the run together, of which
  every batch runs what it has, and 1F1B, whose order depends on no size in the batch.  Runs
  alternate, so that ratios are taken between neighbours;
- kills: planner processes killed at random times, and losses compared with the undisturbed run as
  Megatron's log prints them.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import date
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from megatron_dip.plan import load_plan, save_plan
from megatron_dip.planner import joint_problem, make_plan
from megatron_dip.report import LocalRun, run_local_training

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "cpu"))

from planner_processes import Killer, Watcher, wait_until_ended  # noqa: E402
from real_cpu import CONFIG, make_data, remove_traces  # noqa: E402

WARM_UP_ITERATIONS = 3
STALL_SECONDS = 300.0
# No plan is a lesser one because of the machine's other work: losses can be compared.
PATIENT = {"wait_limit_ms": 120_000.0, "search_limit_ms": 120_000.0}
FOUR_RANKS = {"vision": [[5, 5, 4, 4]], "language": [[1, 1, 1, 1], [1, 1, 1, 1]]}
OVERLOAD_WAIT_MS = 50.0
ONE_PLAN_EVALUATIONS = 4096

console = Console()


def main(
    iterations: Annotated[int, typer.Option(min=6, help="Of the runs for waits and kills.")] = 200,
    pairs: Annotated[int, typer.Option(min=1, help="Rounds of searched and static plans.")] = 3,
    pair_iterations: Annotated[int, typer.Option(min=6, help="Of each run in a pair.")] = 20,
    kills: Annotated[int, typer.Option(min=1, help="Planner processes to kill.")] = 50,
    output: Annotated[Path, typer.Option(help="Where logs, traces and results go.")] = (
        ROOT / "runs" / "plan_service"
    ),
) -> None:
    """Measure and print."""
    make_data()
    output.mkdir(parents=True, exist_ok=True)
    runs = Runs(output)
    undisturbed = runs.train("waits-2", iterations, planning=PATIENT)
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "date": date.today().isoformat(),
        "iterations": iterations,
        "waits": {"2 ranks": runs.waits("waits-2")},
    }
    show("waits, 2 ranks", results["waits"]["2 ranks"])
    runs.train("waits-4", iterations, num_ranks=4, layers=FOUR_RANKS)
    results["waits"]["4 ranks"] = runs.waits("waits-4")
    show("waits, 4 ranks", results["waits"]["4 ranks"])
    results["overload"] = overload(runs, max(6, iterations // 5))
    show("overload", results["overload"])
    results["throughput"] = throughput(runs, pairs, pair_iterations)
    show("throughput", results["throughput"])
    results["kills"] = kill(runs, iterations, kills, undisturbed)
    show("kills", results["kills"])
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {output / 'results.json'}")


class Runs:
    """Training runs by name, each in a folder of its own."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def train(
        self,
        name: str,
        iterations: int,
        *,
        num_ranks: int = 2,
        layers: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        planning: Mapping[str, float] | None = None,
        num_microbatches: int = 4,
        kills: int = 0,
        mean_seconds: float = 0.0,
    ) -> tuple[LocalRun, int]:
        """Train under plans; the run, and how many planner processes were killed."""
        folder = self._output / name
        folder.mkdir(parents=True, exist_ok=True)
        remove_traces(folder)
        config = write_config(folder, num_ranks, layers or {}, schedule or {}, planning or {})
        arguments = [
            *("--pipeline-model-parallel-size", str(num_ranks), "--dip-config", str(config)),
            *("--micro-batch-size", "1", "--global-batch-size", str(num_microbatches)),
            "--dip-schedule",
            *("--train-iters", str(iterations), "--eval-iters", "0", "--eval-interval", "100000"),
            *("--lr", "1e-3", "--min-lr", "1e-4", "--ckpt-format", "torch_dist"),
            *("--hidden-dropout", "0", "--attention-dropout", "0"),
            *("--dip-trace-dir", str(folder / "trace"), "--dip-trace-interval", "1"),
        ]
        killer = Killer(mean_seconds, kills) if kills else None
        with Watcher() as watcher, killer or nullcontext():
            run = run_local_training(
                ROOT / "examples" / "pretrain_vlm.py",
                arguments,
                num_ranks=num_ranks,
                log=folder / "training.log",
                stall_seconds=STALL_SECONDS,
            )
        wait_until_ended(watcher.seen)
        return run, killer.num_killed if killer else 0

    def steps(self, name: str) -> list[dict[str, Any]]:
        """What the plan owner says of each step after the warm-up, with ``step_ms``."""
        trace = self._output / name / "trace" / "rank00000.jsonl"
        lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
        return [
            line["planning"]
            | {
                "step_ms": (line["end_us"] - line["start_us"]) / 1000,
                "plan_ms": sum(s[2] - s[1] for s in line["spans"] if s[0] == "plan") / 1000,
            }
            for line in lines[WARM_UP_ITERATIONS - 1 :]
        ]

    @cached_property
    def one_plan(self) -> Path:
        """The plan for the batches of the first searched run together, searched for long."""
        files = sorted((self._output / "searched-0" / "trace").glob("plan-replica0-*.json"))
        plans = [load_plan(file) for file in files]
        joint = joint_problem([plan.problem for plan in plans])
        path = self._output / "one_plan.json"
        save_plan(make_plan(joint, plans[0].partition, evaluations=ONE_PLAN_EVALUATIONS), path)
        return path

    def waits(self, name: str) -> dict[str, Any]:
        """What training waited for, after the warm-up."""
        steps = self.steps(name)
        hidden = [
            step for before, step in pairwise(steps) if step["planning_ms"] < before["step_ms"]
        ]
        return {
            "steps": len(steps) - 1,
            "steps_whose_plan_takes_less_than_a_step": len(hidden),
            "longest_wait_in_them_ms": max(step["waited_ms"] for step in hidden),
            "longest_wait_ms": max(step["waited_ms"] for step in steps[1:]),
            "planning_ms": median(step["planning_ms"] for step in steps),
            "step_ms": median(step["step_ms"] for step in steps),
            # Digests compared, and unpacking where the plan came late.
            "agreeing_ms": median(step["plan_ms"] - step["waited_ms"] for step in steps),
            "origins": dict(Counter(step["origin"] for step in steps)),
        }


def write_config(
    folder: Path,
    num_ranks: int,
    layers: Mapping[str, Any],
    schedule: Mapping[str, Any],
    planning: Mapping[str, float],
) -> Path:
    """The configuration of the small model, changed; paths in it become absolute."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    if "plan" in schedule:
        del config["schedule"]["planner"]
    config["schedule"] |= {"num_ranks": num_ranks} | dict(schedule)
    # Costs that follow what is measured make other plans in every run, and other last digits.
    config["schedule"].setdefault("costs", {})["feedback"] = False
    for name, counts in layers.items():
        config["schedule"]["modules"][name]["layers"] = counts
    config["planning"] = config.get("planning", {}) | dict(planning)
    for key in ("path", "image_folder", "tokenizer"):
        config["data"][key] = str((CONFIG.parent / config["data"][key]).resolve())
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def overload(runs: Runs, iterations: int) -> dict[str, Any]:
    """A search that takes four steps, where training waits for a twentieth of a second."""
    step_ms = median(step["step_ms"] for step in runs.steps("waits-2"))
    runs.train(
        "overload",
        iterations,
        schedule={"evaluations": 10**7},
        planning={"wait_limit_ms": OVERLOAD_WAIT_MS, "search_limit_ms": 4 * step_ms},
    )
    steps = runs.steps("overload")
    lesser = sum(step["origin"] != "searched" for step in steps)
    return {
        "wait_limit_ms": OVERLOAD_WAIT_MS,
        "longest_wait_ms": max(step["waited_ms"] for step in steps),
        "lesser_plans": f"{lesser} of {len(steps)}",
        "origins": dict(Counter(step["origin"] for step in steps)),
    }


def throughput(runs: Runs, pairs: int, iterations: int) -> dict[str, Any]:
    """Seconds of the steps after the warm-up, pair by pair."""
    seconds: dict[str, list[float]] = {"searched": [], "one plan": [], "1F1B": []}
    for pair in range(pairs):
        for name, times in seconds.items():
            schedule = {
                "searched": dict,
                "one plan": lambda: {"plan": str(runs.one_plan)},
                "1F1B": lambda: {"planner": "one_f_one_b"},
            }[name]()
            folder = f"{name.replace(' ', '-')}-{pair}"
            run, _ = runs.train(folder, iterations, schedule=schedule, num_microbatches=8)
            origins = {step["origin"] for step in runs.steps(folder)}
            assert origins == {"searched"}, f"a batch had another plan in {folder}: {origins}"
            times.append(sum(run.elapsed_ms[WARM_UP_ITERATIONS:]) / 1000)
    ratios = {name: ratios_of(seconds[name], seconds["searched"]) for name in ("one plan", "1F1B")}
    medians = {name: median(values) for name, values in ratios.items()}
    return {"seconds": seconds, "ratios": ratios, "median_ratios": medians}


def ratios_of(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def kill(
    runs: Runs, iterations: int, kills: int, undisturbed: tuple[LocalRun, int]
) -> dict[str, Any]:
    """As the run for waits, with planner processes killed."""
    expected, _ = undisturbed
    mean_seconds = sum(expected.elapsed_ms) / 1000 / kills
    run, num_killed = runs.train(
        "kills", iterations, planning=PATIENT, kills=kills, mean_seconds=0.8 * mean_seconds
    )
    return {
        "killed": num_killed,
        "steps": len(run.losses),
        "steps_lost": iterations - len(run.losses),
        "losses_changed": sum(a != b for a, b in zip(run.losses, expected.losses, strict=True)),
        "origins": dict(Counter(step["origin"] for step in runs.steps("kills"))),
        "longest_wait_ms": max(step["waited_ms"] for step in runs.steps("kills")),
    }


def show(title: str, result: Mapping[str, Any]) -> None:
    """One part of the results, as text."""
    console.print(f"[bold]{title}[/bold]")
    for name, value in result.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        console.print(f"  {name.replace('_', ' ')}: {shown}")


if __name__ == "__main__":
    typer.run(main)
