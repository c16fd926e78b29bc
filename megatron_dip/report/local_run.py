"""A training run on the cores of this machine: start it, follow its log, read what it printed."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dip.errors import DipError

__all__ = ["LocalRun", "run_local_training"]

_ITERATION = re.compile(
    r"iteration +(?P<number>\d+)/ *\d+ \|.*elapsed time per iteration \(ms\): (?P<elapsed_ms>\S+) "
    r"\|.*lm loss: (?P<loss>\S+) \|.*grad norm: (?P<grad_norm>\S+) \|"
)
_SHOWN_LINES = 15


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
    log: Path,
    timeout_seconds: float,
    on_iteration: Callable[[int, float], None] = lambda number, loss: None,
) -> LocalRun:
    """Run a pretrain script on ``num_ranks`` processes of one pinned core each.

    Args:
        script: The pretrain script.
        arguments: Its arguments; ``--log-interval 1`` is added.
        num_ranks: Processes.
        log: File for all that they print.
        timeout_seconds: After this the processes are ended.
        on_iteration: Called with number and loss of each iteration as it is logged.

    Raises:
        DipError: The run failed or took too long; the message ends with the last lines it printed.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), "-m", "megatron_dip.launch", "--cpu", "--pin"),
        *(str(script), *arguments, "--log-interval", "1"),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []
    elapsed: list[float] = []
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        timer = threading.Timer(timeout_seconds, _end, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.write(line)
                found = _ITERATION.search(line)
                if found:
                    losses.append(float(found["loss"]))
                    elapsed.append(float(found["elapsed_ms"]))
                    on_iteration(int(found["number"]), losses[-1])
            code = process.wait()
            timed_out = not timer.is_alive()
        finally:
            timer.cancel()
            _end(process)
    if code:
        reason = f"took more than {timeout_seconds:.0f} s" if timed_out else f"failed ({code})"
        raise DipError(f"training {reason}; the end of {log}:\n{_tail(log)}")
    return LocalRun(losses=tuple(losses), elapsed_ms=tuple(elapsed))


def _end(process: "subprocess.Popen[str]") -> None:
    """End the launcher and its ranks: they share a session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if "megatron-dip: error" in line]
    return "\n".join(errors or lines[-_SHOWN_LINES:])
