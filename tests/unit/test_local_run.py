"""A training run on this machine leaves no process behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dip.report.local_run import launched

# As torchrun does: every rank has a session of its own.  These ignore what asks them to end, and
# say who they are when they do.
RANK = "setsid sh -c 'trap \"\" TERM HUP; echo $$; exec sleep 600' &"
LAUNCHER = f"{RANK} {RANK}"
LASTING_LAUNCHER = f"{LAUNCHER} sleep 600"
CALLER = """
import os, signal, sys
from megatron_dip.report.local_run import launched
# What a shell starts in the background ignores it, and what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
with launched(["sh", "-c", sys.argv[1]], os.environ, limit_seconds=60) as launcher:
    for line in launcher.lines():
        print(line, end="", flush=True)
"""
LIMIT_S = 120.0


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody waited for is a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # The name, in parentheses, may hold anything.
    return status.rpartition(") ")[2][0] not in "ZX"


def assert_ended(lines: list[str]) -> None:
    pids = [int(line) for line in lines]
    assert len(pids) == 2
    deadline = time.monotonic() + LIMIT_S
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ranks_end_with_a_caller_that_is_asked_to_end(number: signal.Signals):
    command = [sys.executable, "-c", CALLER, LASTING_LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pids = [caller.stdout.readline(), caller.stdout.readline()]
        caller.send_signal(number)
        try:
            code = caller.wait(timeout=LIMIT_S)
        finally:
            caller.kill()
            assert_ended(pids)
    assert code == (-number if number == signal.SIGINT else 128 + number)


def test_ranks_end_that_a_launcher_left_behind():
    command = ["sh", "-c", LAUNCHER]
    with launched(command, os.environ, limit_seconds=60) as launcher:
        lines = launcher.lines()
        pids = [next(lines), next(lines)]
        assert launcher.wait() == 0
        assert all(is_running(int(pid)) for pid in pids)
    assert_ended(pids)
    assert not launcher.timed_out


def test_a_run_that_takes_too_long_ends():
    command = ["sh", "-c", LASTING_LAUNCHER]
    with launched(command, os.environ, limit_seconds=60, grace_seconds=2.0) as launcher:
        lines = launcher.lines()
        pids = [next(lines), next(lines)]
        launcher.limit(0.1)
        assert launcher.wait() != 0
    assert launcher.timed_out
    assert_ended(pids)
