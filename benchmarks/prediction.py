"""Predicted against measured steps and memory on real computation, one core per rank.

    .venv/bin/python benchmarks/prediction.py [--family omni] [--iterations 24] [--output FOLDER]

Trains the tiny model of every family on two pipeline ranks as the README's commands do, dropout
included, with plans for every batch and costs that follow what is measured.  Prints medians over
the steps after the fourth: predicted over measured makespan, and predicted over held activations of
every rank.  What else the machine computes at the same time is in the makespans; memory does not
depend on it.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from megatron_dip.families.configs import load_config
from megatron_dip.report import read_records, run_local_training

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
CALIBRATION_ITERATIONS = 4
STALL_SECONDS = 300.0


class Family(NamedTuple):
    """One of the README's training commands."""

    script: str
    data_script: str
    flags: tuple[str, ...]


FAMILIES = {
    "vlm": Family("pretrain_vlm.py", "make_sample_data.py", ("1", "8", "1e-3")),
    "omni": Family("pretrain_vlm.py", "make_sample_sounds.py", ("1", "8", "1e-3")),
    "t2v": Family("pretrain_t2v.py", "make_sample_clips.py", ("2", "8", "1e-3")),
    "lavin": Family("finetune_lavin.py", "make_scienceqa_data.py", ("4", "16", "5e-3")),
}


def main(
    family: Annotated[list[str] | None, typer.Option(help="All four where not given.")] = None,
    iterations: Annotated[int, typer.Option(min=10)] = 24,
    output: Annotated[Path, typer.Option(help="Where the runs go.")] = (
        ROOT / "runs" / "prediction"
    ),
) -> None:
    """Run and print."""
    table = Table(
        "family", "makespan, predicted over measured", "memory per rank", "actions off by"
    )
    results = {}
    for name in family or FAMILIES:
        found = results[name] = run(name, iterations, output / name)
        memory = " ".join(f"{ratio:.3f}" for ratio in found["memory"])
        table.add_row(name, f"{found['makespan']:.2f}", memory, f"{found['actions']:.1%}")
    Console().print(table)
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "iterations": iterations,
        "families": results,
    }
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(name: str, iterations: int, folder: Path) -> dict[str, object]:
    """Train one family and compare."""
    config, chosen = ROOT / "configs" / f"{name}_tiny.yaml", FAMILIES[name]
    data = load_config(config).data.path.parent
    if not data.exists():
        script = ROOT / "scripts" / chosen.data_script
        subprocess.run([sys.executable, str(script), str(data)], check=True)
    for old in folder.glob("trace/*"):
        old.unlink()
    micro_batch, global_batch, learning_rate = chosen.flags
    run_local_training(
        ROOT / "examples" / chosen.script,
        (
            *("--dip-schedule", "--dip-config", str(config)),
            *("--dip-trace-dir", str(folder / "trace"), "--train-iters", str(iterations)),
            *("--pipeline-model-parallel-size", str(NUM_RANKS)),
            *("--micro-batch-size", micro_batch, "--global-batch-size", global_batch),
            *("--lr", learning_rate, "--lr-decay-style", "constant"),
        ),
        num_ranks=NUM_RANKS,
        log=folder / "log.txt",
        stall_seconds=STALL_SECONDS,
    )
    records = [r for r in read_records(folder / "trace") if r.iteration > CALIBRATION_ITERATIONS]
    return {
        "makespan": median(record.predicted_us / record.measured_us for record in records),
        "makespans": [round(record.predicted_us / record.measured_us, 3) for record in records],
        "memory": [
            median(r.ranks[rank].predicted_bytes / r.ranks[rank].stored_bytes for r in records)
            for rank in range(NUM_RANKS)
        ],
        "actions": median(record.action_error for record in records),
    }


if __name__ == "__main__":
    typer.run(main)
