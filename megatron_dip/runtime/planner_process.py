"""A planner process as its plan owner sees it: started, written to and read without waiting."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import megatron_dip
from megatron_dip.planner.messages import Message, decode_frames, encode_frame
from megatron_dip.runtime.signals import started_deaf

__all__ = ["PlannerProcess", "ProcessLimits", "wait_for_any"]

_RECEIVE_BYTES = 1 << 16
_END_LIMIT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ProcessLimits:
    """What a planner process may take from the machine that trains."""

    memory_bytes: int
    nice: int
    cores: tuple[int, ...] = ()
    """Where it runs; where its owner may run if empty."""


class PlannerProcess:
    """One process; it ends with its owner, however that ends, and not by a signal to the job."""

    def __init__(self, limits: ProcessLimits) -> None:
        own, other = socket.socketpair()
        own.setblocking(False)
        command = [
            *(sys.executable, "-m", "megatron_dip.planner.worker"),
            *("--socket", str(other.fileno()), "--parent", str(os.getpid())),
            *("--memory-bytes", str(limits.memory_bytes), "--nice", str(limits.nice)),
            *("--cores", *map(str, limits.cores)),
        ]
        with other, started_deaf():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=_environment(),
            )
        self._socket = own
        self._received = bytearray()
        self._outgoing = bytearray()
        self.is_alive = True

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def send(self, message: Message, patience_seconds: float = 0.0) -> None:
        """Send ``message``; what is not taken within ``patience_seconds`` goes later."""
        self._outgoing += encode_frame(message)
        deadline = time.monotonic() + patience_seconds
        self._flush()
        while self._outgoing and self.is_alive and (left := deadline - time.monotonic()) > 0:
            select.select([], [self._socket], [], left)
            self._flush()

    def receive(self) -> list[Message]:
        """What has arrived; ``is_alive`` turns false when the process has ended."""
        self._flush()
        try:
            while content := self._socket.recv(_RECEIVE_BYTES):
                self._received += content
            self.is_alive = False
        except BlockingIOError:
            # Nothing more for now.
            return decode_frames(self._received)
        except OSError:
            self.is_alive = False
        return decode_frames(self._received)

    def end(self) -> str:
        """Kill the process unless it has ended by itself; returns how it ended, in words."""
        if self.is_alive:
            self._process.kill()
        self.is_alive = False
        self._socket.close()
        try:
            status = self._process.wait(_END_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            # It closed its socket and did not end: whatever it does, it does not plan.
            self._process.kill()
            status = self._process.wait(_END_LIMIT_SECONDS)
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            # It is busy; the rest goes later.
            return
        except OSError:
            self.is_alive = False


def wait_for_any(processes: Sequence[PlannerProcess], seconds: float) -> None:
    """Return when one of the processes has said something or has ended, or after ``seconds``."""
    connection.wait([process.fileno() for process in processes], max(0.0, seconds))


def _environment() -> dict[str, str]:
    """One thread per library, and this very package."""
    package_folder = str(Path(megatron_dip.__file__).resolve().parents[1])
    paths = [package_folder, os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
