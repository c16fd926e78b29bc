"""Throughput on real computation: plans against Megatron's own schedule, one core per rank.

    .venv/bin/python benchmarks/real_cpu.py [--pairs 5] [--iterations 10]

Three ways to train the model of ``configs/vlm_tiny.yaml`` on the same varying batches, on
two pipeline ranks with one pinned core each:

- stock: Megatron's 1F1B with its own placement, the vision tower with half of the language layers
  on the first rank;
- balanced: Megatron's 1F1B with the number of language layers on the first rank that was fastest
  in a trial of all of them (Megatron's schedule cannot cut inside the vision tower);
- dip: plans made for every batch.

Runs alternate (stock, balanced, dip, stock, ...), so that ratios are taken between neighbours.
Prints medians and the ratios pair by pair, whatever they are, and writes them as JSON.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_dip.families.configs import load_config
from megatron_dip.report import read_records, read_traces, run_local_training

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "vlm_tiny.yaml"
NUM_RANKS = 2
WARM_UP_ITERATIONS = 3
TIMEOUT_SECONDS = 300.0

console = Console()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run."""

    seconds: float
    """Of all iterations after the warm-up."""
    idle_fractions: tuple[float, ...]
    """Per rank, median over iterations."""
    planning_ms: float
    """Median over iterations; zero under Megatron's schedule."""


def main(
    pairs: Annotated[int, typer.Option(min=1, help="Rounds of stock, balanced, dip.")] = 5,
    iterations: Annotated[int, typer.Option(min=5, help="Iterations per run.")] = 10,
    output: Annotated[Path, typer.Option(help="Where logs, traces and results go.")] = (
        ROOT / "runs" / "real_cpu"
    ),
) -> None:
    """Compare the three and print what was measured."""
    make_data()
    with Progress(console=console) as progress:
        # Half of them is the stock placement; more, beside the tower, can only be worse.
        first_layers = list(range(1, load_config(CONFIG).model.language.num_layers // 2))
        task = progress.add_task("", total=len(first_layers) + 3 * pairs)

        def measure(name: str, flags: Sequence[str], folder: str) -> Measurement:
            progress.update(task, description=name)
            result = run_once(output / folder, iterations, flags)
            progress.advance(task)
            return result

        trial = {
            count: measure(f"trial: {count} layers first", first_flags(count), f"trial-{count}")
            for count in first_layers
        }
        best = min(trial, key=lambda count: trial[count].seconds)
        ways = {"stock": (), "balanced": first_flags(best), "dip": ("--dip-schedule",)}
        runs: dict[str, list[Measurement]] = {name: [] for name in ways}
        for pair in range(pairs):
            for name, flags in ways.items():
                runs[name].append(measure(name, flags, f"{name}-{pair}"))
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "iterations_counted": iterations - WARM_UP_ITERATIONS,
        "tokens": count_tokens(output / "dip-0"),
        "first_layers_of_balanced": best,
        "trial_seconds": {count: one.seconds for count, one in trial.items()},
        "runs": {name: [asdict(one) for one in measured] for name, measured in runs.items()},
        "schedule_overhead": schedule_overhead(),
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(speed_table(results))
    console.print(overhead_line(results))
    console.print(f"results: {output / 'results.json'}")


def make_data() -> None:
    """The sample data set that the configuration names, where it is not there yet."""
    folder = load_config(CONFIG).data.path.parent
    if not (folder / "samples.json").exists():
        script = ROOT / "scripts" / "make_sample_data.py"
        subprocess.run([sys.executable, str(script), str(folder)], check=True)


def first_flags(count: int) -> tuple[str, ...]:
    """Megatron's flag for ``count`` language layers on the first rank."""
    return ("--decoder-first-pipeline-num-layers", str(count))


def arguments(folder: Path, iterations: int) -> list[str]:
    return [
        *("--pipeline-model-parallel-size", str(NUM_RANKS), "--dip-config", str(CONFIG)),
        *("--micro-batch-size", "1", "--global-batch-size", "8"),
        *("--train-iters", str(iterations), "--eval-iters", "0", "--eval-interval", "1000"),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--ckpt-format", "torch_dist"),
        *("--hidden-dropout", "0", "--attention-dropout", "0"),
        *("--dip-trace-dir", str(folder / "trace")),
    ]


def run_once(folder: Path, iterations: int, flags: Sequence[str]) -> Measurement:
    """One run; the first iterations warm up and do not count."""
    remove_traces(folder)
    run = run_local_training(
        ROOT / "examples" / "pretrain_vlm.py",
        [*arguments(folder, iterations), *flags],
        num_ranks=NUM_RANKS,
        log=folder / "training.log",
        stall_seconds=TIMEOUT_SECONDS,
    )
    traces = read_traces(folder / "trace")[WARM_UP_ITERATIONS:]
    idle = zip(*(trace.idle_fractions for trace in traces), strict=True)
    planning_us = [
        sum(span.duration_us for span in trace.ranks[0].spans if span.label == "plan")
        for trace in traces
    ]
    return Measurement(
        seconds=sum(run.elapsed_ms[WARM_UP_ITERATIONS:]) / 1000,
        idle_fractions=tuple(median(fractions) for fractions in idle),
        planning_ms=median(planning_us) / 1000,
    )


def remove_traces(folder: Path) -> None:
    """Traces are appended to: those of an earlier benchmark must not be read again."""
    for old in (folder / "trace").glob("*.json*"):
        old.unlink()


def count_tokens(folder: Path) -> int:
    """Tokens of all sequences in the iterations that count: records are there for each of them."""
    records = read_records(folder / "trace")
    return sum(
        record.tokens["language"] for record in records if record.iteration > WARM_UP_ITERATIONS
    )


def schedule_overhead() -> dict[str, float]:
    """Microseconds per step of both schedules; see ``schedule_overhead.py``."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(NUM_RANKS), "-m", "megatron_dip.launch", "--cpu", "--pin"),
        str(ROOT / "benchmarks" / "schedule_overhead.py"),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    printed = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment,
    ).stdout
    result: dict[str, float] = json.loads(printed.strip().splitlines()[-1])
    return result


def speed_table(results: dict[str, Any]) -> Table:
    """Medians, and ratios between neighbouring runs."""
    table = Table(title=f"{results['machine']}, {results['date']}")
    table.add_column("schedule", no_wrap=True)
    for column in ("tokens/s", "idle rank 0", "idle rank 1", "planning"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("dip is faster by (median, all)", justify="right")
    ours = [run["seconds"] for run in results["runs"]["dip"]]
    for name, runs in results["runs"].items():
        ratios = [run["seconds"] / own for run, own in zip(runs, ours, strict=True)]
        idle = zip(*(run["idle_fractions"] for run in runs), strict=True)
        table.add_row(
            name,
            f"{median(results['tokens'] / run['seconds'] for run in runs):,.0f}",
            *(f"{median(fractions):.1%}" for fractions in idle),
            f"{median(run['planning_ms'] for run in runs):.0f} ms",
            f"{median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        )
    table.caption = (
        f"balanced: {results['first_layers_of_balanced']} language layers on the first rank"
    )
    return table


def overhead_line(results: dict[str, Any]) -> str:
    overhead = results["schedule_overhead"]
    return (
        f"a step without computing, transfers included: executor {overhead['executor_us']:.0f} us, "
        f"Megatron's schedule {overhead['megatron_us']:.0f} us"
    )


if __name__ == "__main__":
    typer.run(main)
