"""CPU meanings of the ``torch.cuda`` functions that Megatron calls.

The CPU is one device with one stream on which everything has already happened: waiting does
nothing, an event's time is the time at which it was recorded.  Functions without a CPU meaning
(graphs, memory pools, the profiler) are left alone and fail as on any machine without a GPU.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import torch

__all__ = ["CpuEvent", "CpuStream", "replace_cuda_functions"]

_MILLISECONDS = 1000.0


class CpuStream:
    """Stands for ``torch.cuda.Stream``: what is issued has run when the call returns."""

    device = torch.device("cpu")
    device_index = 0
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        """An event that has happened."""
        event = event or CpuEvent()
        event.record(self)
        return event

    def wait_stream(self, stream: "CpuStream") -> None:
        """Nothing to wait for."""

    def wait_event(self, event: "CpuEvent") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything has run."""
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority."""
        return 0, 0


class CpuEvent:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = time.perf_counter()

    def record(self, stream: CpuStream | None = None) -> None:
        """Remember the time."""
        self._recorded_at = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end_event: "CpuEvent") -> float:
        """Milliseconds between the two records."""
        return (end_event._recorded_at - self._recorded_at) * _MILLISECONDS


def replace_cuda_functions() -> None:
    """Put the table below in the place of torch's functions."""
    functions = _functions()
    # The submodules hold the functions under the same names, and Megatron uses both ways.
    for owner in (torch.cuda, torch.cuda.memory, torch.cuda.streams):
        for name, function in functions.items():
            if owner is torch.cuda or hasattr(owner, name):
                setattr(owner, name, function)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        setattr(torch.cuda.nvtx, name, _nothing)
    # torch.optim and the data loader ask here whether there is a device besides the CPU.
    torch.accelerator.is_available = lambda: False


def _functions() -> dict[str, Callable[..., Any]]:
    stream = CpuStream()
    no_op = [
        "set_device",
        "synchronize",
        "empty_cache",
        "ipc_collect",
        "init",
        "_lazy_init",
        "set_stream",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "reset_accumulated_memory_stats",
    ]
    zero = [
        "current_device",
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
        "utilization",
        "temperature",
        "power_draw",
        "clock_rate",
    ]
    return {
        **dict.fromkeys(no_op, _nothing),
        **dict.fromkeys(zero, lambda *args, **kwargs: 0),
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "_lazy_call": lambda function, **kwargs: function(),
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "cpu",
        "get_device_properties": _device_properties,
        "mem_get_info": lambda *args: (_memory_bytes(), _memory_bytes()),
        "memory_stats": lambda *args, **kwargs: collections.defaultdict(int),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": _context,
        "device": _context,
        "Stream": CpuStream,
        "Event": CpuEvent,
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextlib.contextmanager
def _context(*args: Any) -> Iterator[None]:
    yield


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_properties(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        total_memory=_memory_bytes(),
        multi_processor_count=os.cpu_count() or 1,
    )
