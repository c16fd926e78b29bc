"""Ranks of training runs, forked from one process that has imported Megatron.

Importing Megatron takes seconds of a core, most tiny runs less.  So one process imports it, starts
nothing, and forks the ranks of all runs of a test session; see ``training_process``.

It is not the fork server of ``multiprocessing``: the package has use for that one itself, with
other modules, and it passes over in silence what it cannot import beforehand.
"""

import functools
import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from launching import (
    REPOSITORY,
    CompletedRank,
    end_group,
    free_port,
    rank_variables,
    wait_for_all,
)

__all__ = ["fork_ranks", "record_of", "run_modes", "serve"]

# What takes a few seconds, on a machine that is slow and busy.
_START_SECONDS = 200.0
_END_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all ranks of a run do, and how long they may take."""

    environments: list[dict[str, str]]
    arguments: list[str]
    folder: Path
    timeout_seconds: float
    watch: bool


@dataclass(frozen=True, kw_only=True)
class _Ending:
    returncode: int
    timed_out: bool


def fork_ranks(
    folder: Path,
    num_ranks: int,
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    watch: bool = False,
    packages: Path | None = None,
) -> list[CompletedRank]:
    """Run ``python -m megatron_dip.launch --cpu ARGUMENTS`` once per rank; how each ended.

    Time limits as in ``launching.run_ranks``.  A rank that ends by itself leaves its children to
    themselves, so that tests can see whether it has ended them.

    Args:
        folder: Takes logs and records, and must be new.
        num_ranks: How many.
        arguments: Script and its arguments.
        timeout_seconds: After this all ranks are ended.
        watch: Whether ``record_of`` a rank gets what ``training_process`` sees, as JSON.
        packages: A folder that stands first on the path where Megatron is imported.
    """
    folder.mkdir(parents=True)
    port = free_port()
    job = _Job(
        environments=[rank_variables(rank, num_ranks, port) for rank in range(num_ranks)],
        arguments=list(arguments),
        folder=folder,
        timeout_seconds=timeout_seconds,
        watch=watch,
    )
    logs = [_log_of(folder, rank) for rank in range(num_ranks)]
    return [
        CompletedRank(
            returncode=ending.returncode,
            output=log.read_text(errors="replace") if log.exists() else "no log",
            timed_out=ending.timed_out,
        )
        for ending, log in zip(_server(packages).run(job), logs, strict=True)
    ]


def run_modes(worker: Path, folder: Path, modes: Sequence[str]) -> dict[str, list[Any]]:
    """Run ``worker FOLDER MODE...`` on two ranks; per mode, what each of them saved there."""
    arguments = [str(worker), str(folder), *modes]
    for rank in fork_ranks(folder / "run", 2, arguments, timeout_seconds=180):
        assert rank.returncode == 0, rank.output
    return {mode: [torch.load(folder / f"{mode}-{rank}.pt") for rank in range(2)] for mode in modes}


def record_of(folder: Path, rank: int) -> Path:
    """What was seen on a rank of a run."""
    return folder / f"rank{rank}.json"


def _log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


class _Server:
    """The process that forks, as the tests see it; it ends when they do."""

    def __init__(self, packages: Path | None) -> None:
        self._connection, other = multiprocessing.Pipe()
        paths = [*([str(packages)] if packages else []), str(Path(__file__).parent)]
        paths += [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        own = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        code = "import sys, forked_ranks; forked_ranks.serve(int(sys.argv[1]))"
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(other.fileno())],
                pass_fds=[other.fileno()],
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._receive(_START_SECONDS)

    def run(self, job: _Job) -> list[_Ending]:
        self._connection.send(job)
        return self._receive(job.timeout_seconds + _END_SECONDS)

    def _receive(self, limit_seconds: float) -> list[_Ending]:
        try:
            assert self._connection.poll(limit_seconds), f"no answer within {limit_seconds:.0f} s"
            endings: list[_Ending] = self._connection.recv()
        except BaseException:
            # What it may still say would be taken for the answer to something else.
            _server.cache_clear()
            self._connection.close()
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
            raise
        return endings


@functools.cache
def _server(packages: Path | None) -> _Server:
    return _Server(packages)


# ---- in that process ------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Fork ranks as the other end of the connection wants, until it closes."""
    import training_process  # noqa: F401

    # Else every rank's collector walks all that was imported, and so copies its pages.
    gc.collect()
    gc.freeze()
    with Connection(descriptor) as connection:
        connection.send([])
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            connection.send(_run(job, connection))


def _run(job: _Job, connection: Connection) -> list[_Ending]:
    context = multiprocessing.get_context("fork")
    # No daemons: data loaders have workers, and daemons may have no children.
    processes: list[BaseProcess] = [
        context.Process(target=_run_rank, args=(job, rank, connection))
        for rank in range(len(job.environments))
    ]

    def pause(seconds: float) -> None:
        running = [process.sentinel for process in processes if process.exitcode is None]
        if connection in wait([connection, *running], seconds):
            sys.exit("the tests have ended before their ranks")

    try:
        for process in processes:
            process.start()
        late = wait_for_all(lambda: [one.exitcode for one in processes], job.timeout_seconds, pause)
    finally:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                end_group(process.pid)
                # It may not have got as far as having a group.
                process.kill()
                process.join(_END_SECONDS)
    return [
        _Ending(returncode=process.exitcode or 0, timed_out=rank in late)
        for rank, process in enumerate(processes)
    ]


def _run_rank(job: _Job, rank: int, connection: Connection) -> None:
    # Not at the top: the process that runs the tests must not be switched to CPU mode.
    from training_process import run_rank

    connection.close()
    # A group of its own, so that its children can be ended with it.
    os.setsid()
    log = os.open(_log_of(job.folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    record = record_of(job.folder, rank) if job.watch else None
    run_rank(job.environments[rank], job.arguments, record)
