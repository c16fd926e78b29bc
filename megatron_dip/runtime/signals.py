"""Signals that stop a run, kept from the processes that it has started.

A launcher or a cluster sends them to all processes of a job.  Training answers by saving what it
has, for which it still needs the processes that load data, plan and write.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hear_stop_signals", "started_deaf"]

_STOP_SIGNALS = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)


@contextmanager
def started_deaf() -> Iterator[None]:
    """Processes started within get none of these signals, not even while they start.

    They must end by themselves, or be killed: SIGTERM does not reach them either.
    """
    # A process inherits the mask of the thread that starts it, also through exec.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def hear_stop_signals() -> None:
    """In a process started deaf: from now on its own handlers get the signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
