"""Asking other programs, each within a time limit."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from megatron_dip.doctor.facts import Answer
from megatron_dip.errors import DataError, one_line, shown
from megatron_dip.reading import parse_json

__all__ = ["MARK", "ask_program", "ask_python"]

MARK = "megatron-dip probe: "
"""Begins the one line of a probe that counts: packages print on import."""
_MOST_CHARACTERS = 400


def ask_program(command: Sequence[str], limit_seconds: float) -> tuple[str, str | None]:
    """What a program prints, and why that cannot be used.

    All processes that it starts end with it.

    Returns:
        Its standard output, and None or the reason.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return "", f"{command[0]} cannot be started ({error.strerror})"
    try:
        output, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {limit_seconds:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        return output, f"ended by signal {signal.Signals(-process.returncode).name}"
    if process.returncode:
        last = (errors or output).strip().splitlines()[-1:] or ["it printed nothing"]
        return (
            output,
            f"ended with status {process.returncode}: {one_line(last[0], _MOST_CHARACTERS)}",
        )
    return output, None


def ask_python(probe: str, limit_seconds: float) -> Answer:
    """One of :mod:`megatron_dip.doctor.probes`, in a process that imports as a run does.

    ``-m`` puts the current folder on the path, as torchrun's ``-m megatron_dip.launch`` does.
    """
    command = [sys.executable, "-m", "megatron_dip.doctor.probes", probe]
    output, failure = ask_program(command, limit_seconds)
    if failure is not None:
        return Answer(failure=failure)
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        return Answer(failure="it ended without an answer")
    try:
        found = parse_json(lines[-1].removeprefix(MARK), "its answer", DataError)
    except DataError as error:
        return Answer(failure=str(error))
    if not isinstance(found, dict):
        return Answer(failure=f"its answer is {shown(found)}")
    return Answer(found=found)
