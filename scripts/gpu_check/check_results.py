"""What all parts of the check share: their arguments, starting ranks, and one line of JSON each.

A part runs on ``--device cuda``; with ``cpu`` it runs small, to try the part itself, and its line
says ``cpu``: nothing in it is about a GPU.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What tests start ranks with, and the programs that they run.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cpu")]

from launching import CompletedRank, run_ranks  # noqa: E402

__all__ = ["ROOT", "answers_of", "part_arguments", "read_results", "report", "start_ranks", "tell"]

_MARK = "gpu-check answer: "
SEVERAL_RANKS = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
"""Asks NCCL to let ranks share a GPU, which it refuses otherwise."""


def part_arguments(
    description: str | None, limit_seconds: float | None = None
) -> argparse.ArgumentParser:
    """Arguments of every part; ``limit_seconds`` is that of one start of ranks."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    if limit_seconds is not None:
        parser.add_argument("--limit-seconds", type=float, default=limit_seconds)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines are added to it")
    return parser


def report(results: Path, part: str, device: str, found: Mapping[str, Any]) -> None:
    """Add what a part found to the results, and print it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"part": part, "device": device, "found": found}) + "\n")
    print(f"{part} ({device}):")
    _print(found, "  ")


def _print(found: Mapping[str, Any], indent: str) -> None:
    for name, value in found.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        else:
            print(f"{indent}{name}: {f'{value:.4g}' if isinstance(value, float) else value}")


def read_results(results: Path, part: str) -> dict[str, Any]:
    """What an earlier part found; nothing where it did not run."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    found = [one for one in map(json.loads, lines) if one["part"] == part]
    return found[-1].get("found", {}) if found else {}


def start_ranks(
    script: str,
    arguments: Sequence[str],
    num_ranks: int,
    *,
    limit_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[CompletedRank]:
    """Run ``script`` as so many ranks; all are ended when the time is over."""
    command = [sys.executable, script, *arguments]
    return run_ranks(num_ranks, command, limit_seconds, env=environment, cwd=ROOT)


def tell(found: Mapping[str, Any]) -> None:
    """Of a rank: hand findings to the part that started it."""
    print(_MARK + json.dumps(found), flush=True)


def answers_of(rank: CompletedRank) -> dict[str, Any]:
    """What a rank told, or how it ended."""
    lines = [line for line in rank.output.splitlines() if line.startswith(_MARK)]
    if rank.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
        return answer
    how = "ended by its time limit" if rank.timed_out else f"ended with {rank.returncode}"
    return {"failed": f"{how}: {' | '.join(rank.output.strip().splitlines()[-3:])[-600:]}"}
