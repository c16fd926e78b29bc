"""Runs a suite of ``runtime_program.py`` and reads what its ranks report."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from forked_ranks import fork_ranks

__all__ = ["LIMIT_S", "PATIENCE_S", "CaseReport", "run_suite"]

PROGRAM = Path(__file__).with_name("runtime_program.py")
LIMIT_S = 2.0
"""The limit of waits in those of the program's cases in which one must end."""
PATIENCE_S = 120.0
"""The limit in the others, which nothing reaches."""


class CaseReport(NamedTuple):
    """How a case ended on one rank; ``outcome`` is "ok" or the name of an exception."""

    outcome: str
    message: str
    cause: str
    seconds: float
    result: Any


def run_suite(
    name: str, num_ranks: int, *, dies: int | None = None
) -> dict[str, list[CaseReport | None]]:
    """Per case the reports of all ranks; None where rank ``dies`` did not live to make one."""
    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        completed = fork_ranks(
            Path(folder) / "run", num_ranks, [str(PROGRAM), name], timeout_seconds=280
        )
    cases: dict[str, list[CaseReport | None]] = {}
    for rank, one in enumerate(completed):
        assert one.returncode == (3 if rank == dies else 0), f"rank {rank}:\n{one.output}"
        for line in one.output.splitlines():
            if line.startswith('{"case"'):
                record = json.loads(line)
                reports = cases.setdefault(record["case"], [None] * num_ranks)
                reports[rank] = CaseReport(
                    outcome=record["outcome"],
                    message=record["message"],
                    cause=record["cause"],
                    seconds=record["seconds"],
                    result=record.get("result"),
                )
    return cases
