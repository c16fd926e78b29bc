"""The processes of a rehearsal: one per rank on this machine, each wait with a limit."""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from megatron_dip.errors import ConfigError, ExecutionError
from megatron_dip.plan import Plan
from megatron_dip.plan.validation import validate_plan
from megatron_dip.rehearsal.results import RankRun, RankTask, Rehearsal
from megatron_dip.rehearsal.scaling import scale_plan
from megatron_dip.simulator import simulate

__all__ = ["Rehearsal", "rehearse"]

_RANK_MODULE = "megatron_dip.rehearsal.rank"
_START_SECONDS = 120.0
"""Limit for processes to start and connect."""
_SLOWEST = 20.0
"""Times the predicted duration after which a repetition is given up."""
_GRACE_SECONDS = 5.0
"""What the others get to report their own error once one has failed."""


class _Rank(NamedTuple):
    process: BaseProcess
    results: Connection
    """Of what :func:`megatron_dip.rehearsal.rank.run_rank` sends."""


def rehearse(
    plan: Plan, *, time_scale: float = 1.0, transfer_scale: float = 1.0, repetitions: int = 3
) -> Rehearsal:
    """Run ``plan`` on a process per rank; see the package's docstring.

    Raises:
        PlanError: The plan is not a correct schedule of its problem.
        ConfigError: A scale or the number of repetitions is not above zero.
        ExecutionError: A rank failed, died or did not end within its time limit.
    """
    if repetitions < 1:
        raise ConfigError(f"--repetitions {repetitions}: expected at least 1")
    validate_plan(plan)
    scaled = scale_plan(plan, time_scale, transfer_scale)
    predicted = simulate(scaled)
    timeout_seconds = _START_SECONDS + _SLOWEST * predicted.makespan_us / 1e6
    with tempfile.TemporaryDirectory(prefix="megatron-dip-") as folder:
        tasks = [
            RankTask(
                rank=rank,
                plan=scaled,
                durations_us={t.action: t.end_us - t.start_us for t in line},
                repetitions=repetitions,
                timeout_seconds=timeout_seconds,
                store=Path(folder) / "store",
            )
            for rank, line in enumerate(predicted.timelines)
        ]
        runs = _run_processes(tasks, timeout_seconds * repetitions)
    return Rehearsal(
        plan=scaled,
        predicted_us=predicted.makespan_us,
        predicted_rank_us=tuple(line[-1].end_us if line else 0.0 for line in predicted.timelines),
        repetitions=tuple(zip(*runs, strict=True)),
    )


def _run_processes(tasks: Sequence[RankTask], limit_seconds: float) -> list[list[RankRun]]:
    """The runs of every rank; whatever happens, no process is left."""
    context = multiprocessing.get_context("forkserver")
    # Importing torch once is enough for all ranks.
    context.set_forkserver_preload([_RANK_MODULE])
    ranks: list[_Rank] = []
    try:
        for task in tasks:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(task, sending), daemon=True)
            process.start()
            # Only the rank holds the other end, so that its death ends the pipe.
            sending.close()
            ranks.append(_Rank(process, receiving))
        runs = _collect(ranks, time.monotonic() + limit_seconds)
        for rank in ranks:
            rank.process.join(_GRACE_SECONDS)
        return runs
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.results.close()


def _run_rank(task: RankTask, results: Connection) -> None:
    # Here and not above: torch is loaded where ranks run, not where they are started from.
    from megatron_dip.rehearsal.rank import run_rank

    run_rank(task, results)


def _collect(ranks: Sequence[_Rank], deadline: float) -> list[list[RankRun]]:
    """What every rank sends; raises for the first that died, else for all that failed."""
    runs: dict[int, list[RankRun]] = {}
    failures: dict[int, str] = {}
    waiting = {rank.results: number for number, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            number = waiting.pop(pipe)
            try:
                received = pipe.recv()
            except EOFError:
                ranks[number].process.join(_GRACE_SECONDS)
                raise ExecutionError(
                    f"rank {number} of the rehearsal {_ending(ranks[number].process)}"
                ) from None
            if isinstance(received, str):
                failures[number] = received
                # The others fail soon, for want of this one.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            else:
                runs[number] = received
    if failures:
        raise ExecutionError(
            "the rehearsal failed:\n"
            + "\n".join(f"rank {number}: {text}" for number, text in sorted(failures.items()))
        )
    if waiting:
        raise ExecutionError(
            f"ranks {sorted(waiting.values())} of the rehearsal did not end within their time "
            f"limit (the machine may be overloaded: use a larger --time-scale)"
        )
    return [runs[number] for number in range(len(ranks))]


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (is there memory enough?)"
    return f"ended with exit code {code} before it had a result"
