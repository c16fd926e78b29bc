"""Finding the planner processes of runs, watching and ending them."""

import os
import random
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Self

__all__ = ["Killer", "Watcher", "planner_processes", "wait_until_ended"]

_END_SECONDS = 240.0


def planner_processes(ancestor: int) -> list[int]:
    """The planner processes that descend from a process; those that have ended are left out."""
    parents: dict[int, int] = {}
    planners = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            # It has just ended.
            continue
        parents[int(entry.name)] = int(fields[1])
        if _is_planner(int(entry.name)):
            planners.append(int(entry.name))
    return [pid for pid in planners if _descends(pid, ancestor, parents)]


def wait_until_ended(pids: Iterable[int]) -> None:
    """Assert that planner processes end soon, though nobody ends them any more."""
    deadline = time.monotonic() + _END_SECONDS
    while left := [pid for pid in pids if _is_planner(pid)]:
        assert time.monotonic() < deadline, f"planner processes are left: {left}"
        time.sleep(0.05)


def _is_planner(pid: int) -> bool:
    """Whether a process is a planner and has not ended."""
    try:
        # That of a process that has ended and was not asked for its status is empty.
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return "megatron_dip.planner.worker" in command


class _Beside(ABC):
    """Something that a thread does while it is in use."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Until ``_end`` is set."""


class Watcher(_Beside):
    """While in use, remembers the planner processes of the runs of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def _run(self) -> None:
        while not self._end.wait(0.1):
            self.seen.update(planner_processes(os.getpid()))


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


class Killer(_Beside):
    """While in use, kills a planner process of the runs of this process now and then.

    Args:
        mean_seconds: Between two of them.
        limit: How many, at most.
        tally: A file that grows by one byte with every one of them, if given: for runs that go no
            further before enough have been killed.
    """

    def __init__(
        self, mean_seconds: float, limit: int, seed: int = 0, tally: Path | None = None
    ) -> None:
        super().__init__()
        self.num_killed = 0
        self._tally = tally
        self._mean_seconds = mean_seconds
        self._limit = limit
        self._random = random.Random(seed)

    def _run(self) -> None:
        while self.num_killed < self._limit:
            if self._end.wait(self._random.uniform(0, 2 * self._mean_seconds)):
                return
            found = planner_processes(os.getpid())
            if found:
                self._kill(self._random.choice(found))

    def _kill(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.num_killed += 1
        if self._tally is not None:
            self._tally.write_text("." * self.num_killed)
