"""Throughput of Megatron-LM's own scripts: one flag more against their own schedule, in pairs.

    .venv/bin/python benchmarks/any_script.py MEGATRON_LM [--pairs 3] [--iterations 12]

``MEGATRON_LM`` is a checkout of Megatron-LM at ``core_v0.19.0``.  Its scripts run unmodified on
two pipeline ranks with one pinned core each:

- vision: ``pretrain_vlm.py`` with made-up images of one size, one in every sequence.  Megatron's
  own placement has the whole tower and half of the language model on the first rank;
- documents: ``pretrain_gpt.py`` with packed documents of very different lengths, each attending to
  itself (``--dataloader-inter-document-masking``), so that microbatches differ in their work.

Runs alternate, so that ratios are taken between neighbours; each run's number is the median time
of its iterations after the first ones.  Prints what was measured, whatever it is, and writes it as
JSON.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_ITERATIONS = 4
TIMEOUT_SECONDS = 400.0
COMMON = """
    --pipeline-model-parallel-size 2 --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --mock-data
    --tokenizer-type NullTokenizer --vocab-size 1024 --log-interval 1 --eval-iters 0
    --eval-interval 1000 --split 99,1,0 --attention-dropout 0 --hidden-dropout 0 --num-workers 0
    --untie-embeddings-and-output-weights --num-attention-heads 4 --hidden-size 192
"""
CASES: dict[str, dict[str, Any]] = {
    "vision": {
        "script": "pretrain_vlm.py",
        "arguments": """
            --encoder-num-layers 6 --decoder-num-layers 6 --seq-length 128
            --dataloader-seq-length 64 --max-position-embeddings 256 --img-h 112 --img-w 112
            --patch-dim 14 --micro-batch-size 2 --global-batch-size 16
            --disable-vision-class-token --ckpt-format torch
        """,
        "modules": {},
    },
    "documents": {
        "script": "pretrain_gpt.py",
        "arguments": """
            --num-layers 8 --seq-length 512 --max-position-embeddings 512
            --position-embedding-type rope --micro-batch-size 1 --global-batch-size 8
            --dataloader-inter-document-masking
        """,
        "modules": {},
    },
}
_TIME = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")

console = Console()


def main(
    megatron_lm: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    pairs: Annotated[int, typer.Option(min=1)] = 3,
    iterations: Annotated[int, typer.Option(min=WARM_UP_ITERATIONS + 3)] = 12,
    output: Annotated[Path | None, typer.Option(help="where the JSON goes")] = None,
) -> None:
    """Measure both scripts under both schedules."""
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "iterations": iterations,
        "cases": {},
    }
    with Progress(console=console) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("runs", total=2 * pairs * len(CASES))
        for name, case in CASES.items():
            config = Path(folder) / f"{name}.yaml"
            config.write_text(json.dumps({"schedule": {"modules": case["modules"]}}))
            plans = ("--dip-schedule", "--dip-config", str(config))
            measured: dict[str, list[float]] = {"stock_ms": [], "plans_ms": []}
            for _ in range(pairs):
                for key, flags in (("stock_ms", ()), ("plans_ms", plans)):
                    measured[key].append(_run(megatron_lm, case, iterations, flags))
                    progress.advance(task)
            ratios = [a / b for a, b in zip(*measured.values(), strict=True)]
            results["cases"][name] = measured | {"ratios": ratios, "ratio": median(ratios)}
            console.print(f"{name}: {measured}, plans are faster by {median(ratios):.3f}")
    text = json.dumps(results, indent=1)
    console.print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


def _run(megatron_lm: Path, case: dict[str, Any], iterations: int, flags: tuple[str, ...]) -> float:
    """Milliseconds of an iteration: the median after the warm-up.

    Raises:
        RuntimeError: The run failed; shows the end of its log.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_dip.launch", "--cpu", "--pin", str(megatron_lm / case["script"])),
        *shlex.split(COMMON + case["arguments"]),
        *("--train-iters", str(iterations), *flags),
    ]
    paths = os.pathsep.join((str(ROOT), str(megatron_lm)))
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    times = [float(found) for found in _TIME.findall(done.stdout)]
    if done.returncode or len(times) != iterations:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-3000:]}")
    return median(times[WARM_UP_ITERATIONS:])


if __name__ == "__main__":
    typer.run(main)
