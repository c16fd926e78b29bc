"""The quickstart: one small model, one set of weights, two schedules, side by side.

Called by ``scripts/quickstart.sh``, which sets up what it needs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_dip.errors import DipError
from megatron_dip.families.configs import load_config
from megatron_dip.plan import Plan, load_plan
from megatron_dip.report import (
    IterationTrace,
    LocalRun,
    measured_panel,
    module_slowness,
    read_records,
    read_traces,
    run_local_training,
)
from megatron_dip.simulator.timeline import plan_panel, write_timeline

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "pretrain_vlm.py"
TEMPLATE = ROOT / "configs" / "vlm_tiny.yaml"
CALIBRATION_ITERATIONS = 3
STALL_SECONDS = 600.0
# After so many, caches are warm and plans are made at times that were measured, not at stated ones.
WARM_UP_ITERATIONS = 4

console = Console()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One schedule's run."""

    name: str
    run: LocalRun
    traces: list[IterationTrace]


def main(
    iterations: Annotated[int, typer.Option(min=5, help="Iterations per schedule.")] = 16,
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = ROOT / "runs/quickstart",
) -> None:
    """Train under both schedules and compare them."""
    num_ranks = min(4, max(2, len(os.sched_getaffinity(0))))
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    console.print(f"[bold]1/4[/] sample data: photographs and text, in {output / 'data'}")
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_sample_data.py"), str(output / "data")],
        check=True,
    )
    config = write_config(output, num_ranks, slowness={})
    console.print(
        f"[bold]2/4[/] initial weights for both, and this machine's speed ({num_ranks} ranks)"
    )
    calibrate(output, config, num_ranks)
    outcomes = []
    for step, (name, flags) in enumerate(
        [("Megatron 1F1B", ()), ("megatron-dip", ("--dip-schedule",))], start=3
    ):
        console.print(f"[bold]{step}/4[/] training under {name}")
        folder = output / name.replace(" ", "-").lower()
        run = train(folder, config, num_ranks, iterations, name, flags)
        outcomes.append(Outcome(name=name, run=run, traces=read_traces(folder / "trace")))
    # Timelines and plans are kept of some iterations, records of all.
    tokens = {
        record.iteration: record.tokens["language"]
        for record in read_records(output / "megatron-dip" / "trace")
    }
    console.print(comparison(outcomes, tokens))
    timeline = output / "timeline.html"
    draw(timeline, outcomes, output / "megatron-dip")
    console.print(f"timeline, predicted and measured: [bold]{timeline}[/] (open it in a browser)")


def write_config(output: Path, num_ranks: int, slowness: dict[str, float]) -> Path:
    """The tiny model's configuration for this machine: ranks, data, measured speed."""
    content = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    schedule = content["schedule"]
    if num_ranks != schedule["num_ranks"]:
        schedule["num_ranks"] = num_ranks
        for module in schedule["modules"].values():
            module.pop("layers", None)
    for name, factor in slowness.items():
        module = schedule["modules"][name]
        rate = module.get("flops_per_us", schedule["costs"]["flops_per_us"])
        module["flops_per_us"] = rate / factor
    data = output.resolve() / "data"
    content["data"].update(
        path=str(data / "samples.json"),
        image_folder=str(data / "images"),
        tokenizer=str(data / "tokenizer.json"),
    )
    path = output / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def calibrate(output: Path, config: Path, num_ranks: int) -> None:
    """Save the initial weights, and set the planner's rates to what this machine achieves."""
    folder = output / "initial"
    train(
        folder,
        config,
        num_ranks,
        CALIBRATION_ITERATIONS,
        "calibration",
        # A learning rate of zero: the checkpoint holds the initial weights.
        ("--dip-schedule", "--lr", "0", "--save", str(output / "checkpoint")),
    )
    traces = read_traces(folder / "trace")[1:]
    slowness = module_slowness((trace, plan_of(folder, trace.iteration)) for trace in traces)
    write_config(output, num_ranks, slowness)


def train(
    folder: Path,
    config: Path,
    num_ranks: int,
    iterations: int,
    name: str,
    flags: Sequence[str],
) -> LocalRun:
    """One training run with a progress bar."""
    num_layers = load_config(config).model.language.num_layers
    arguments = [
        *("--pipeline-model-parallel-size", str(num_ranks), "--dip-config", str(config)),
        *("--micro-batch-size", "1", "--global-batch-size", "8"),
        *("--train-iters", str(iterations), "--eval-iters", "0", "--eval-interval", "1000"),
        *("--hidden-dropout", "0", "--attention-dropout", "0", "--ckpt-format", "torch_dist"),
        *("--save-interval", "1000", "--dip-trace-dir", str(folder / "trace")),
        *("--lr-warmup-iters", "2" if iterations > CALIBRATION_ITERATIONS else "0"),
        *flags,
    ]
    if "--lr" not in flags:
        arguments += ["--lr", "2e-3", "--min-lr", "2e-4", "--finetune"]
        arguments += ["--load", str(folder.parent / "checkpoint"), "--exit-on-missing-checkpoint"]
    if "--dip-schedule" not in flags and num_layers % num_ranks:
        first = num_layers - (num_ranks - 1) * -(-num_layers // num_ranks)
        arguments += ["--decoder-first-pipeline-num-layers", str(first)]
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=iterations, loss="-")
        return run_local_training(
            SCRIPT,
            arguments,
            num_ranks=num_ranks,
            log=folder / "training.log",
            stall_seconds=STALL_SECONDS,
            on_iteration=lambda number, loss: progress.update(
                task, completed=number, loss=f"{loss:.3f}"
            ),
        )


def plan_of(folder: Path, iteration: int) -> Plan:
    """The plan that an iteration ran."""
    return load_plan(folder / "trace" / f"plan-replica0-{iteration:06d}.json")


def comparison(outcomes: Sequence[Outcome], tokens: Mapping[int, int]) -> Table:
    """Losses, speed and idle time of every schedule.

    Args:
        tokens: Of all sequences of a batch, image tokens included; by iteration.
    """
    table = Table(title="the same model, weights and batches under two schedules")
    table.add_column("schedule", no_wrap=True)
    idle_columns = [f"idle {rank}" for rank in range(len(outcomes[0].traces[0].ranks))]
    for column in ("loss first", "last", "tokens/s", "speed", *idle_columns):
        table.add_column(column, justify="right")
    speeds = [tokens_per_second(outcome, tokens) for outcome in outcomes]
    for outcome, speed in zip(outcomes, speeds, strict=True):
        idle = zip(*(trace.idle_fractions for trace in outcome.traces), strict=True)
        table.add_row(
            outcome.name,
            f"{outcome.run.losses[0]:.3f}",
            f"{outcome.run.losses[-1]:.3f}",
            f"{speed:,.0f}",
            f"{relative_speed(outcome, outcomes[0]):.2f}x",
            *(f"{median(fractions):.1%}" for fractions in idle),
        )
    table.caption = (
        "medians over iterations, speed batch by batch; idle: share of time a rank neither "
        "computes nor loads data"
    )
    return table


def tokens_per_second(outcome: Outcome, tokens: Mapping[int, int]) -> float:
    """Median over iterations; the first ones, which warm caches up, do not count."""
    return median(
        tokens[iteration] / (milliseconds / 1000)
        for iteration, milliseconds in enumerate(outcome.run.elapsed_ms, start=1)
        if iteration > WARM_UP_ITERATIONS and iteration in tokens
    )


def relative_speed(outcome: Outcome, first: Outcome) -> float:
    """How many times as fast as the first schedule: median over batches, which both have alike.

    Batches differ more than what is gained on each, so that pairs tell more from fewer iterations
    than a quotient of medians.
    """
    pairs = zip(first.run.elapsed_ms, outcome.run.elapsed_ms, strict=True)
    return median(theirs / ours for theirs, ours in list(pairs)[WARM_UP_ITERATIONS:])


def draw(path: Path, outcomes: Sequence[Outcome], folder: Path) -> None:
    """The iteration of median length, predicted and measured, under both schedules.

    Args:
        folder: Of the run under plans.
    """
    stock, dip = ({trace.iteration: trace for trace in one.traces} for one in outcomes)
    iterations = [number for number in dip.keys() & stock.keys() if number > WARM_UP_ITERATIONS]
    iterations.sort(key=lambda number: dip[number].duration_us)
    chosen = iterations[len(iterations) // 2]
    plan = plan_of(folder, chosen)
    write_timeline(
        path,
        f"iteration {chosen} of the quickstart",
        [
            plan_panel(plan, "megatron-dip, predicted"),
            measured_panel(dip[chosen], "megatron-dip, measured", plan.partition),
            measured_panel(stock[chosen], "Megatron 1F1B, measured (vision tower on rank 0)"),
        ],
    )


def run() -> None:
    try:
        typer.run(main)
    except DipError as error:
        console.print(f"[bold red]quickstart: error:[/] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
