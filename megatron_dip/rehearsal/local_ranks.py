"""Processes of this machine, one per rank, that report to the one that started them.

A rank is a function of a task and of the sending end of a pipe: it sends :class:`Progress` as often
as it likes and at its end a :class:`Done`, or a :class:`Failed`.  Every wait has a limit, and
whatever happens, no process is left.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from megatron_dip.errors import ExecutionError

__all__ = ["Done", "Failed", "Progress", "run_local_ranks"]

_GRACE_SECONDS = 5.0
"""What the others get to report their own error once one has failed."""


class Progress(NamedTuple):
    """Something that a rank has got done."""

    value: Any


class Done(NamedTuple):
    """The result of a rank."""

    value: Any


class Failed(NamedTuple):
    """Why a rank has no result."""

    reason: str


class _Rank(NamedTuple):
    process: BaseProcess
    messages: Connection


def run_local_ranks(
    what: str,
    target: Callable[[Any, Connection], None],
    tasks: Sequence[Any],
    *,
    limit_seconds: float,
    remedy: str,
    preload: Sequence[str] = (),
    on_progress: Callable[[int, Any], None] = lambda rank, value: None,
) -> list[Any]:
    """Run ``target`` once per task and return the values of their :class:`Done`.

    Args:
        what: For messages: "the rehearsal".
        target: A function at the top of a module that does not import what ``preload`` does.
        remedy: What to do where the limit is exceeded.
        preload: Modules that all ranks share: they are imported once and forked.
        on_progress: Called with rank and value of every :class:`Progress`.

    Raises:
        ExecutionError: A rank failed, died or did not end within ``limit_seconds``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ranks: list[_Rank] = []
    try:
        for task in tasks:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=target, args=(task, sending), daemon=True)
            process.start()
            # Only the rank holds the other end, so that its death ends the pipe.
            sending.close()
            ranks.append(_Rank(process, receiving))
        values = _collect(what, ranks, time.monotonic() + limit_seconds, remedy, on_progress)
        for rank in ranks:
            rank.process.join(_GRACE_SECONDS)
        return values
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.messages.close()


def _collect(
    what: str,
    ranks: Sequence[_Rank],
    deadline: float,
    remedy: str,
    on_progress: Callable[[int, Any], None],
) -> list[Any]:
    """What every rank has made; raises for the first that died, else for all that failed."""
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {rank.messages: number for number, rank in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            number = waiting[pipe]
            try:
                message = pipe.recv()
            except EOFError:
                ranks[number].process.join(_GRACE_SECONDS)
                ending = _ending(ranks[number].process)
                raise ExecutionError(f"rank {number} of {what} {ending}") from None
            if isinstance(message, Progress):
                on_progress(number, message.value)
                continue
            del waiting[pipe]
            if isinstance(message, Failed):
                failures[number] = message.reason
                # The others fail soon, for want of this one.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            else:
                values[number] = message.value
    if failures:
        reasons = "\n".join(f"rank {number}: {text}" for number, text in sorted(failures.items()))
        raise ExecutionError(f"{what} failed:\n{reasons}")
    if waiting:
        raise ExecutionError(
            f"ranks {sorted(waiting.values())} of {what} did not end within their time limit "
            f"({remedy})"
        )
    return [values[number] for number in range(len(ranks))]


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (is there memory enough?)"
    return f"ended with exit code {code} before it had a result"
