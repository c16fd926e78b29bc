"""The planner process: makes plans beside training, and ends when the process that started it does.

Started by ``runtime.planner_process`` as ``python -m megatron_dip.planner.worker OPTIONS``, with
one end of a pair of connected sockets.  It plans in the order of the requests, sends every plan
that is better than the one before, and stops between two rounds where it is no longer wanted.
"""

import argparse
import ctypes
import logging
import os
import queue
import resource
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_dip.plan import Plan
from megatron_dip.planner.batch import Batch
from megatron_dip.planner.messages import (
    Failed,
    Forget,
    Message,
    Planned,
    Ready,
    Request,
    Setup,
    decode_frames,
    encode_frame,
)
from megatron_dip.planner.rounds import plan_in_rounds

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_RECEIVE_BYTES = 1 << 16


class _Worker:
    """Plans what a thread of its own receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._requests: queue.SimpleQueue[Setup | Request] = queue.SimpleQueue()
        self._forgotten: set[int] = set()
        self._setup: Setup | None = None
        self._warnings = _Warnings()
        logging.getLogger("megatron_dip").addHandler(self._warnings)

    def run(self) -> None:
        """Plan until the other end closes."""
        threading.Thread(target=self._receive, daemon=True).start()
        self._send(Ready())
        while True:
            message = self._requests.get()
            if isinstance(message, Setup):
                self._setup = message
            elif message.number not in self._forgotten:
                self._plan(message)

    def _plan(self, request: Request) -> None:
        assert self._setup is not None, "a setup is sent before the first request"
        started = time.monotonic()
        self._warnings.texts.clear()
        sent: Plan | None = None
        try:
            batch = Batch(replicas=request.replicas, builder=self._setup.builder)
            for found in plan_in_rounds(
                batch.problem, self._setup.partition, self._setup.settings, request.limit_ms
            ):
                planned = Planned(
                    number=request.number,
                    packed=b"" if found.plan is sent else batch.pack(found.plan),
                    is_last=found.is_last,
                    is_searched=found.is_searched,
                    planning_ms=(time.monotonic() - started) * 1000,
                    warnings=tuple(self._warnings.texts),
                )
                self._send(planned)
                sent = found.plan
                if request.number in self._forgotten:
                    return
        # Whatever it is: training goes on with another plan, and its log says why.
        except Exception as error:
            logger.debug("request %d failed", request.number, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            self._send(Failed(number=request.number, reason=reason))

    def _send(self, message: Message) -> None:
        try:
            self._connection.sendall(encode_frame(message))
        except OSError:
            os._exit(0)

    def _receive(self) -> None:
        """Runs beside planning, so that the end of the other process ends this one at once."""
        try:
            received = bytearray()
            while content := self._connection.recv(_RECEIVE_BYTES):
                received += content
                for message in decode_frames(received):
                    if isinstance(message, Forget):
                        self._forgotten.add(message.number)
                    elif isinstance(message, Setup | Request):
                        self._requests.put(message)
        except ConnectionError:
            # It ended with a message of ours unread.
            os._exit(0)
        except Exception:
            # Out of memory, for one: a process that hears nothing is of no use to anyone.
            logger.exception("a planner process cannot read its requests")
            os._exit(1)
        os._exit(0)


class _Warnings(logging.Handler):
    """Keeps what planning warns of, each text once, for the log of the plan owner."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.texts[record.getMessage()] = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a planner process; returns never."""
    parser = argparse.ArgumentParser(prog="megatron-dip planner process")
    parser.add_argument("--socket", type=int, required=True, help="file descriptor")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--memory-bytes", type=int, required=True, help="most data to hold")
    parser.add_argument("--nice", type=int, required=True)
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="where to run")
    options = parser.parse_args(arguments)
    _end_with(options.parent)
    # An interrupt from the keyboard goes to all processes; training decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(options.nice)
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_bytes, options.memory_bytes))
    # Where the machine runs out of memory, this process goes before any training process.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _Worker(socket.socket(fileno=options.socket)).run()


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that does.

    The closing socket says so too, but a process forked by the parent may hold it open.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main()
