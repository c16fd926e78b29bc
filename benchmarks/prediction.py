"""Predicted against measured iterations and memory on real computation, one core per rank.

    .venv/bin/python benchmarks/prediction.py [--iterations 40] [--profile]

Trains the model of ``configs/vlm_tiny.yaml`` on two pipeline ranks with plans for every batch and
costs that follow what is measured.  Prints medians over the iterations after the calibration:
error of the makespan, of the whole step and of single actions, and the most activations held on
every rank against the plan's.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from megatron_dip.config import load_config
from megatron_dip.report import read_records, run_local_training

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "vlm_tiny.yaml"
NUM_RANKS = 2
CALIBRATION_ITERATIONS = 5
STALL_SECONDS = 300.0


def main(
    iterations: Annotated[int, typer.Option(min=10)] = 40,
    profile: Annotated[bool, typer.Option("--profile", help="Start from measured times.")] = False,
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = (
        ROOT / "runs" / "prediction"
    ),
) -> None:
    """Run and print."""
    data = load_config(CONFIG).data.path.parent
    if not (data / "samples.json").exists():
        script = ROOT / "scripts" / "make_sample_data.py"
        subprocess.run([sys.executable, str(script), str(data)], check=True)
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("trace/*"):
        old.unlink()
    run_local_training(
        ROOT / "examples" / "pretrain_vlm.py",
        (
            *("--dip-schedule", "--dip-config", str(write_config(output, profile))),
            *("--dip-trace-dir", str(output / "trace"), "--train-iters", str(iterations)),
            *("--pipeline-model-parallel-size", str(NUM_RANKS), "--micro-batch-size", "1"),
            *("--global-batch-size", "8", "--lr", "1e-3", "--lr-decay-style", "constant"),
            *("--hidden-dropout", "0", "--attention-dropout", "0", "--eval-iters", "0"),
        ),
        num_ranks=NUM_RANKS,
        log=output / "log.txt",
        stall_seconds=STALL_SECONDS,
    )
    records = [r for r in read_records(output / "trace") if r.iteration > CALIBRATION_ITERATIONS]
    errors = {
        "makespan": [abs(record.error) for record in records],
        "step": [abs(record.step_error) for record in records],
        "actions": [record.action_error for record in records],
    }
    table = Table("error of", "median", "90% below")
    for name, values in errors.items():
        high = sorted(values)[int(0.9 * (len(values) - 1))]
        table.add_row(name, f"{median(values):.1%}", f"{high:.1%}")
    memory = [
        [(one.predicted_bytes, one.stored_bytes) for one in record.ranks] for record in records
    ]
    ratios = [predicted / stored for ranks in memory for predicted, stored in ranks]
    console = Console()
    console.print(f"iterations {CALIBRATION_ITERATIONS + 1} to {iterations}")
    console.print(table)
    console.print(
        f"activations, predicted over measured peak: median {median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}; largest {max(s for r in memory for _, s in r)} B"
    )
    results = {name: median(values) for name, values in errors.items()}
    results["memory_ratios"] = [min(ratios), median(ratios), max(ratios)]
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_config(output: Path, profile: bool) -> Path:
    """The configuration with absolute paths, and times measured on this machine if asked for."""
    data = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name, value in load_config(CONFIG).data:
        if isinstance(value, Path):
            data["data"][name] = str(value)
    if profile:
        target = output / "profile.json"
        command = ("profile", str(CONFIG), "-o", str(target), "--device", "cpu")
        subprocess.run([sys.executable, "-m", "megatron_dip.cli.main", *command], check=True)
        data["schedule"]["costs"]["profile"] = str(target)
    path = output / "config.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


if __name__ == "__main__":
    typer.run(main)
