"""A training run on this machine alone: start it, follow its log, read what it printed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Never

from megatron_dip.errors import DipError

__all__ = ["LocalRun", "run_local_training"]

_ITERATION = re.compile(
    r"iteration +(?P<number>\d+)/ *\d+ \|.*elapsed time per iteration \(ms\): (?P<elapsed_ms>\S+) "
    r"\|.*\w loss: (?P<loss>\S+) \|.*grad norm: (?P<grad_norm>\S+) \|"
)
_SHOWN_LINES = 15
_MARK = "MEGATRON_DIP_LOCAL_RUN"
"""In the environment of a launcher and of all that it starts: ranks have sessions of their own, and
what a launcher that was killed leaves behind is no longer its child."""
_GRACE_SECONDS = 10.0
# A process that is just becoming another program has no environment to be seen.
_LOOKS_IN_VAIN = 2


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """What Megatron's log says, one entry per iteration."""

    losses: tuple[float, ...]
    elapsed_ms: tuple[float, ...]


def run_local_training(
    script: Path,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    on_cpu: bool = True,
    log: Path,
    stall_seconds: float,
    on_iteration: Callable[[int, float], None] = lambda number, loss: None,
) -> LocalRun:
    """Run a pretrain script on ``num_ranks`` processes of this machine.

    Args:
        script: The pretrain script.
        arguments: Its arguments; ``--log-interval 1`` is added.
        num_ranks: Processes.
        on_cpu: Whether they compute on a core each, or on a GPU.
        log: File for all that they print.
        stall_seconds: So long without a finished iteration, the processes are ended, as they are
            when this process gets SIGTERM or SIGHUP. No limit of the whole: how long a run takes
            depends on what else the machine does.
        on_iteration: Called with number and loss of each iteration as it is logged.

    Raises:
        DipError: The run failed or stalled; the message ends with the last lines it printed.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), "-m", "megatron_dip.launch"),
        *(("--cpu", "--pin") if on_cpu else ()),
        # The log is a file: it holds all.
        *("--dip-verbose", str(script), *arguments, "--log-interval", "1"),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    elapsed: list[float] = []
    own_lines: list[str] = []
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    with (
        open(log, "w", encoding="utf-8") as output,
        launched(command, environment, limit_seconds=stall_seconds) as launcher,
    ):
        for line in launcher.lines():
            output.write(line)
            if not launcher.timed_out:
                own_lines.append(line)
            found = _ITERATION.search(line)
            if found:
                losses.append(float(found["loss"]))
                elapsed.append(float(found["elapsed_ms"]))
                launcher.limit(stall_seconds)
                on_iteration(int(found["number"]), losses[-1])
        code = launcher.wait()
    if code:
        late = launcher.timed_out
        reason = f"finished no iteration in {stall_seconds:.0f} s" if late else f"failed ({code})"
        raise DipError(f"training {reason}; the end of {log}:\n{_tail(own_lines)}")
    return LocalRun(losses=tuple(losses), elapsed_ms=tuple(elapsed))


class Launcher:
    """A process that starts others, see :func:`launched`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], grace_seconds: float
    ) -> None:
        self.timed_out = False
        self._grace_seconds = grace_seconds
        self._timer: threading.Timer | None = None
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, _MARK: self._mark},
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def lines(self) -> Iterator[str]:
        """What all of them print, until none is left."""
        assert self._process.stdout is not None
        yield from self._process.stdout

    def wait(self) -> int:
        """The exit status of the process itself."""
        return self._process.wait()

    def limit(self, seconds: float) -> None:
        """So long from now all of them are ended; takes the place of an earlier limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.start()

    def end(self) -> None:
        """End all of them: the launcher may do it within its grace, what is left is killed."""
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def _expire(self) -> None:
        self.timed_out = True
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=self._grace_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        deadline = time.monotonic() + self._grace_seconds
        num_looks_in_vain = 0
        while num_looks_in_vain < _LOOKS_IN_VAIN and time.monotonic() < deadline:
            left = self._left()
            num_looks_in_vain = 0 if left else num_looks_in_vain + 1
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def _left(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                # It has just ended, or belongs to somebody else.
                continue
            if f"{_MARK}={self._mark}".encode() in environment.split(b"\0"):
                found.append(int(entry.name))
        return found


@contextmanager
def launched(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    limit_seconds: float,
    grace_seconds: float = _GRACE_SECONDS,
) -> Iterator[Launcher]:
    """Start ``command``; when the block ends, for whatever reason, nothing that it started is left.

    SIGTERM and SIGHUP end the block with ``SystemExit``; in a thread other than the main one they
    are not seen.

    Args:
        limit_seconds: See :meth:`Launcher.limit`.
        grace_seconds: What the process gets to end those that it started.
    """
    with _signals_raise():
        launcher = Launcher(command, environment, grace_seconds)
        try:
            launcher.limit(limit_seconds)
            yield launcher
        finally:
            launcher.end()


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that end a process raise, so that its ``finally`` blocks run; once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> Never:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _tail(lines: Sequence[str]) -> str:
    errors = [line for line in lines if "megatron-dip: error" in line]
    return "".join(errors or lines[-_SHOWN_LINES:]).rstrip()
