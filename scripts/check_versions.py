#!/usr/bin/env python3
"""Train, save, resume and evaluate under every supported release of Megatron-Core.

    .venv/bin/python scripts/check_versions.py MEGATRON_LM [--release 0.18.2 ...] [--output FILE]

``MEGATRON_LM`` is a clone of Megatron-LM with its tags, for the ``pretrain_gpt.py`` of each
release and for the main branch.  Every release is installed by pip into a temporary folder, beside
what this environment has; nothing that is installed is changed.  Runs are small, on two CPU ranks:

- ``vlm``: this package's ``examples/pretrain_vlm.py``;
- ``gpt``: the release's own ``pretrain_gpt.py``, unmodified.

Of each: Megatron's own schedule, which saves; plans that go on from that checkpoint and save; plans
that go on from their own.  Losses, gradient norms and losses of evaluations of plans are compared
with those of Megatron's own schedule in the same release.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from megatron_dip.families.sample_data.image_text import SampleDataOptions, make_sample_data

ROOT = Path(__file__).resolve().parents[1]
MAIN = "main"
TAGS = {"0.17.1": "core_v0.17.1", "0.18.2": "core_v0.18.2", "0.19.2": "core_v0.19.0", MAIN: "HEAD"}
"""Per release of Megatron-Core, the tag of Megatron-LM whose scripts belong to it."""
TREES = {(MAIN, "vlm"), (MAIN, "gpt"), ("0.17.1", "gpt")}
"""Run from Megatron-LM's own tree: there is no wheel, or it lacks what the script imports."""
NUM_ITERATIONS, STOCK_SAVES, PLANS_SAVE = 6, 2, 4
TOLERANCE = 1e-6
"""Relative; parts and orders of microbatches change the rounding of sums."""
TIMEOUT_SECONDS = 600.0
COMMON = f"""
    --pipeline-model-parallel-size 2 --train-iters {NUM_ITERATIONS} --lr 1e-3 --min-lr 1e-3
    --lr-decay-style constant --log-interval 1 --eval-iters 2 --eval-interval 1000 --num-workers 0
    --hidden-dropout 0 --attention-dropout 0 --ckpt-format torch_dist
    --distributed-timeout-minutes 5
"""
GPT = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --position-embedding-type rope --mock-data --split 90,10,0
    --tokenizer-type NullTokenizer --vocab-size 255 --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 8
"""
VLM = "--micro-batch-size 1 --global-batch-size 8"
GPT_SCHEDULE = {"schedule": {"modules": {"language": {"num_segments": 2}}}}

console = Console(width=120)


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release that is unpacked: where ``megatron`` is, and where its scripts are."""

    name: str
    megatron: Path
    scripts: Path


def main(
    megatron_lm: Annotated[Path, typer.Argument(exists=True, help="A clone with its tags")],
    release: Annotated[list[str] | None, typer.Option(help="One of these alone; or more")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the table goes, too")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder for logs, which is kept")] = None,
) -> None:
    """Run the checks; exit status 1 where one fails."""
    names = release or list(TAGS)
    unknown = sorted(set(names) - set(TAGS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} (known: {', '.join(TAGS)})")
    lines = [
        f"{date.today().isoformat()}, Python {sys.version.split()[0]}, torch {version('torch')}, "
        f"CPU, 2 pipeline ranks, {NUM_ITERATIONS} iterations; differences are relative to "
        f"Megatron's own schedule of the same release",
    ]
    failed = False
    with tempfile.TemporaryDirectory(prefix="versions-") as temporary:
        work = keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        configs = {"vlm": make_vlm(work), "gpt": write_yaml(work / "gpt.yaml", GPT_SCHEDULE)}
        for name in names:
            for what, config in configs.items():
                start = time.monotonic()
                try:
                    found = check(unpack(name, what, megatron_lm, work), what, config, work)
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    failed = True
                    found = f"FAILED: {error}"
                lines.append(f"{name:8}{what:5}{time.monotonic() - start:5.0f} s  {found}")
                console.print(lines[-1], markup=False)
    if output is not None:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    raise typer.Exit(1 if failed else 0)


def make_vlm(work: Path) -> Path:
    """A small model of this package's and data for it; the file of ``--dip-config``."""
    make_sample_data(
        work / "sample",
        SampleDataOptions(num_image_samples=60, num_text_samples=60, max_text_tokens=200),
    )
    config = yaml.safe_load((ROOT / "configs" / "vlm_tiny.yaml").read_text(encoding="utf-8"))
    config["model"]["vision"] |= {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128}
    config["model"]["language"] |= {"num_layers": 4, "seq_length": 256}
    config["data"] |= {
        "path": str(work / "sample" / "samples.json"),
        "image_folder": str(work / "sample" / "images"),
        "tokenizer": str(work / "sample" / "tokenizer.json"),
        "max_image_tokens": 48,
    }
    config["schedule"]["modules"] = {
        "vision": {"num_segments": 1, "sub_microbatch_tokens": 256},
        "language": {"num_segments": 2},
    }
    return write_yaml(work / "vlm.yaml", config)


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    """``path``, which gets ``content``."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def unpack(name: str, what: str, megatron_lm: Path, work: Path) -> Release:
    """Install a release into a folder of its own, with the scripts that belong to it.

    Raises:
        RuntimeError: pip, git or tar failed; says what they said.
    """
    scripts = work / "scripts" / f"{name}-{what}"
    is_tree = (name, what) in TREES
    if not scripts.exists():
        scripts.mkdir(parents=True)
        archive = work / "scripts" / f"{name}-{what}.tar"
        names = ["pretrain_gpt.py", "gpt_builders.py", "model_provider.py"]
        names += ["megatron"] if is_tree else []
        run(["git", "-C", str(megatron_lm), "archive", "-o", str(archive), TAGS[name], *names])
        run(["tar", "-xf", str(archive), "-C", str(scripts)])
    # Wheels alone hold the built helper of data sets, whose source did not change for long.
    wheel = install("0.19.2" if name == MAIN else name, work)
    if not is_tree:
        return Release(name=name, megatron=wheel, scripts=scripts)
    folder = scripts / "megatron" / "core" / "datasets"
    shutil.copy(next(wheel.glob("megatron/core/datasets/helpers_cpp.*")), folder)
    # As in a wheel: nothing is to be built at the start.
    (folder / "Makefile").unlink(missing_ok=True)
    return Release(name=name, megatron=scripts, scripts=scripts)


def install(name: str, work: Path) -> Path:
    """The folder with this release of Megatron-Core and nothing else.

    Raises:
        RuntimeError: pip failed.
    """
    folder = work / "installed" / name
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
        run([*pip, "--target", str(folder), f"megatron-core=={name}"])
    return folder


def check(release: Release, what: str, config: Path, work: Path) -> str:
    """Run one model under one release; what the comparison has shown.

    Raises:
        RuntimeError: A run failed, or plans computed something else.
    """
    script = ROOT / "examples" / "pretrain_vlm.py"
    arguments = shlex.split(f"{COMMON} {VLM} --dip-config {config}")
    plans = ["--dip-schedule"]
    if what == "gpt":
        script = release.scripts / "pretrain_gpt.py"
        arguments = shlex.split(f"{COMMON} {GPT}")
        plans += ["--dip-config", str(config)]
    folder = work / f"{release.name}-{what}"

    def train(name: str, *more: str) -> dict[str, Any]:
        return run_watched(release, folder / name, [str(script), *arguments, *more])

    def saving(name: str, interval: int) -> list[str]:
        return ["--save", str(folder / name / "saved"), "--save-interval", str(interval)]

    def loading(name: str, iteration: int) -> list[str]:
        saved = str(folder / name / "saved")
        return ["--load", saved, "--ckpt-step", str(iteration), "--exit-on-missing-checkpoint"]

    stock = train("stock", *saving("stock", STOCK_SAVES))
    planned = train("plans", *plans, *loading("stock", STOCK_SAVES), *saving("plans", PLANS_SAVE))
    resumed = train("resumed", *plans, *loading("plans", PLANS_SAVE))
    found = [
        difference(planned, stock, first=STOCK_SAVES + 1),
        difference(resumed, stock, first=PLANS_SAVE + 1),
    ]
    loss = stock["steps"][str(NUM_ITERATIONS)][0]
    text = f"loss {loss:.6f}, plans differ by {found[0]:.1e}, resumed plans by {found[1]:.1e}"
    if max(found) > TOLERANCE:
        raise RuntimeError(f"{text}: more than {TOLERANCE}")
    return f"equal: {text}"


def difference(ours: dict[str, Any], stock: dict[str, Any], first: int) -> float:
    """The largest relative one, of iterations from ``first`` on and of evaluations.

    Raises:
        RuntimeError: Something is missing.
    """
    steps = [str(number) for number in range(first, NUM_ITERATIONS + 1)]
    if list(ours["steps"]) != steps or not ours["evaluations"]:
        raise RuntimeError(f"trained iterations {list(ours['steps'])}, expected {steps}")
    found = [value for step in steps for value in ours["steps"][step]] + ours["evaluations"]
    wanted = [value for step in steps for value in stock["steps"][step]] + stock["evaluations"]
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def run_watched(release: Release, folder: Path, command: list[str]) -> dict[str, Any]:
    """Train on two ranks; what ``watched_run.py`` has written."""
    folder.mkdir(parents=True)
    record = folder / "record.json"
    paths = os.pathsep.join(map(str, (release.megatron, release.scripts, ROOT)))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    launch += ["-m", "megatron_dip.launch", "--cpu", "--dip-verbose"]
    run(
        [*launch, str(ROOT / "scripts" / "watched_run.py"), str(record), *command],
        log=folder / "log",
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    return dict(json.loads(record.read_text(encoding="utf-8")))


def run(command: list[str], log: Path | None = None, env: dict[str, str] | None = None) -> None:
    """
    Raises:
        RuntimeError: It failed; shows the end of what it printed.
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        timeout=TIMEOUT_SECONDS,
    )
    if log is not None:
        log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    typer.run(main)
