"""Leave out what Megatron and its libraries print in every run, whatever is given to them.

Every line that is left out is of a kind that is named here.  Lines that Megatron prints are told
by their form; log records and warnings are told by where they come from and how they begin, at
their source.  Nothing else of standard error is touched, so that no error can be lost.

The launcher uses it where ``--dip-verbose`` is not given.
"""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

__all__ = ["LineFilter", "quiet_output"]

_ARGUMENTS_BEGIN = re.compile(r"-+ arguments -+")
_ARGUMENTS_END = re.compile(r"-+ end of arguments -+")
_ARGUMENT = re.compile(r"  \w+ (\.+ .*|\.+| .*)")

_PRINTED = {
    "clock of the start": r"\[(before|after) .*\] datetime: .*|time to initialize megatron.*",
    "step of the start": (
        r"> initializ(ing|ed) .*|>+ (compiling|done with) dataset index builder.*|"
        r"> building train, validation, and test datasets \.\.\.|done with setup \.\.\.|"
        r" > datasets target sizes \(minimum size\):|    (train|validation|test): +\d+|"
        r"Overwriting rerun_state_machine\.current_iteration from -1 to 0\.\.\."
    ),
    "advice to install a package of the vendor": r"WARNING: one_logger package is required .*",
    "option of another schedule": (
        r"WARNING: Setting args\.overlap_p2p_comm and args\.align_param_gather to False since .*|"
        r"Number of virtual stages per pipeline stage: None"
    ),
    "memory of a GPU that is not there": (
        r"\[Rank \d+\] \(.*\) memory \(MB\)( \| [a-z ]+: 0\.00)+ *"
    ),
}


class _Record(NamedTuple):
    kind: str
    logger: str
    beginning: str


_LOGGED = (
    _Record("list of gradient buckets", "distributed.param_and_grad_buffer", "Number of buckets"),
    _Record("way of reduction", "distributed.param_and_grad_buffer", "Using all-reduce for grad"),
    _Record("way of reduction", "distributed.param_and_grad_buffer", "Using reduce-scatter for "),
    _Record(
        "list of options",
        "distributed.distributed_data_parallel",
        "Setting up DistributedDataParallel with config",
    ),
    _Record("list of options", "optimizer", "Setting up optimizer with config"),
    _Record("start of result checks", "rerun_state_machine", "RerunStateMachine initialized in"),
    _Record("start of result checks", "rerun_state_machine", "Result validation enabled"),
    _Record(
        "deprecation inside Megatron",
        "dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
    ),
)

_WARNED = (
    r"\s*It is recommended to use a ModelConfig",
    r"full scope is deprecated\. Use empty cuda_graph_modules",
    r"MimoModelConfig is experimental",
    r"`torch\.distributed\.\w+` is deprecated",
)
"""Deprecations inside Megatron and torch: nobody who trains can do anything about them."""

_WARNED_WITHOUT_GPU = (
    "Transformer Engine and Apex are not installed",
    "Only transformer-engine>=",
    "Apex is not installed",
    "absl.logging is not installed",
)
"""On a CPU there is nothing to install; processes that Megatron starts repeat them."""


class LineFilter:
    """A stream that passes lines on, but for those of the kinds above.

    A line is passed on as a whole when it ends, and what there is of it when the stream is flushed.

    Args:
        note: Takes the place of the first line that is left out.
    """

    def __init__(self, stream: IO[str], note: str = "") -> None:
        self._stream = stream
        self._note = note
        self._pending = ""
        self._in_arguments = False
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        # Another thread may have held it when this process was forked.
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._pending = (self._pending + text).split("\n")
            kept = "".join(map(self._kept, lines))
            if kept:
                self._stream.write(kept)
        return len(text)

    def flush(self) -> None:
        with self._lock:
            if self._pending:
                self._stream.write(self._pending)
                self._pending = ""
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _kept(self, line: str) -> str:
        if not self._is_left_out(line):
            return f"{line}\n"
        note, self._note = self._note, ""
        return note

    def _is_left_out(self, line: str) -> bool:
        if _ARGUMENTS_BEGIN.fullmatch(line):
            self._in_arguments = True
            return True
        if self._in_arguments:
            # Whatever else comes ends the list, so that nothing behind it can be lost.
            self._in_arguments = bool(_ARGUMENT.fullmatch(line))
            return self._in_arguments or bool(_ARGUMENTS_END.fullmatch(line))
        return any(re.fullmatch(pattern, line) for pattern in _PRINTED.values())


@contextmanager
def quiet_output(*, on_cpu: bool, note: str = "") -> Iterator[None]:
    """Leave out the kinds above until the block ends; to be entered before Megatron is imported.

    Processes that are started meanwhile have the filters of warnings as well.
    """
    for record in _LOGGED:
        name = f"megatron.core.{record.logger}"
        logging.getLogger(name).addFilter(_is_other)
    filtered = LineFilter(sys.stdout, note)
    before, sys.stdout = sys.stdout, filtered
    num_options = len(sys.warnoptions)
    try:
        with warnings.catch_warnings():
            for pattern in _WARNED:
                warnings.filterwarnings("ignore", message=pattern)
            if on_cpu:
                for text in _WARNED_WITHOUT_GPU:
                    warnings.filterwarnings("ignore", message=re.escape(text))
                    sys.warnoptions.append(f"ignore:{text}")
            yield
    finally:
        filtered.flush()
        sys.stdout = before
        del sys.warnoptions[num_options:]
        for record in _LOGGED:
            logging.getLogger(f"megatron.core.{record.logger}").removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    """Whether a log record is of none of the kinds above."""
    return not any(
        record.name == f"megatron.core.{one.logger}"
        and str(record.msg).startswith(one.beginning)
        and record.levelno < logging.ERROR
        for one in _LOGGED
    )
