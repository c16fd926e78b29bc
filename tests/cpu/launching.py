"""Start one command on several processes as ``torchrun`` would, with a time limit that holds.

``torchrun`` itself is not used: its agent costs seconds per start, mixes the outputs of its ranks
and, when it is killed, may leave them behind.
"""

import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = [
    "REPOSITORY",
    "CompletedRank",
    "end_group",
    "free_port",
    "rank_variables",
    "run_ranks",
    "wait_for_all",
]

REPOSITORY = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.05
_PORTS = range(20_000, 32_000)
# What the other ranks get to end by themselves once one has failed: enough to print their own
# error on a busy machine, not enough to wait for the time limit of a collective whose peer is gone.
_GRACE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class CompletedRank:
    """How one process ended.

    ``returncode`` is negative (the signal) where it was killed, ``output`` holds standard output
    and standard error in the order written, ``timed_out`` tells that the time limit ended it.
    """

    returncode: int
    output: str
    timed_out: bool = False


def free_port() -> int:
    """A TCP port of this machine that nothing listened on a moment ago.

    Below the range from which the system takes the ports of outgoing connections: one of those
    could take it before the first rank listens.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as listener:
            try:
                listener.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port among {_PORTS}")


def run_ranks(
    num_ranks: int,
    command: Sequence[str],
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> list[CompletedRank]:
    """Run ``command`` once per rank and return how each ended, in the order of the ranks.

    Every process gets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``,
    ``OMP_NUM_THREADS=1`` and the repository on ``PYTHONPATH``; ``env`` is laid over that.  When a
    rank fails, the others are ended soon after; when ``timeout_seconds`` have passed, all are.
    Each rank is a process group of its own, so that its children end with it.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [(Path(folder) / f"rank{rank}.log").open("w+b") for rank in range(num_ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                rank_env = _rank_environment(rank, num_ranks, port) | dict(env or {})
                processes.append(_start(command, rank_env, log, cwd))
            timed_out = wait_for_all(lambda: [one.poll() for one in processes], timeout_seconds)
        finally:
            for process in processes:
                # Its children too, also where it has ended by itself.
                end_group(process.pid)
                process.wait(timeout=60)
        completed = [
            CompletedRank(
                returncode=process.returncode, output=_text(log), timed_out=rank in timed_out
            )
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
        ]
        for log in logs:
            log.close()
        return completed


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What ``torchrun`` would tell one rank of a run on this machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **rank_variables(rank, num_ranks, port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }


def _start(
    command: Sequence[str], env: Mapping[str, str], log: IO[bytes], cwd: Path | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=cwd,
    )


def wait_for_all(
    statuses: Callable[[], Sequence[int | None]],
    timeout_seconds: float,
    pause: Callable[[float], None] = time.sleep,
) -> set[int]:
    """Return when all ranks have ended, some time after one has failed, or when the time is over.

    Args:
        statuses: Per rank its exit status, None while it runs.
        timeout_seconds: From now.
        pause: Waits for so many seconds, or less.

    Returns:
        The ranks that were still running when the time was over.
    """
    deadline = time.monotonic() + timeout_seconds
    grace_deadline: float | None = None
    while None in (found := statuses()):
        now = time.monotonic()
        if now >= deadline:
            return {rank for rank, status in enumerate(found) if status is None}
        if any(found) and grace_deadline is None:
            grace_deadline = now + _GRACE_SECONDS
        if grace_deadline is not None and now >= grace_deadline:
            break
        pause(_POLL_SECONDS)
    return set()


def end_group(leader: int) -> None:
    """End a process that leads a group, and its children."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        # Nobody of the group is left.
        return


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode("utf-8", errors="replace")
