"""The data of the forward that comes next, on its way to the device while others compute.

Copies run on a stream of their own, so that they wait for no kernel and no kernel waits for them
but the one that reads them.  One sub-microbatch is ahead at a time: what stages keep of their data
for a backward counts as theirs, and nothing else stays on the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_dip.plan import Work

__all__ = ["DeviceFeed"]

type Move = Callable[[], tuple[Any, list[torch.Tensor]]]
"""Gives data, and those of its tensors that are on the device."""


class _Moved(NamedTuple):
    data: Any
    on_device: list[torch.Tensor]
    done: torch.cuda.Event


class DeviceFeed:
    """Data by the work that reads it; made once per rank.

    Args:
        device: Where stages compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._ahead: dict[Work, _Moved] = {}

    def start(self, work: Work, move: Move) -> None:
        """Have ``move`` copy the data of ``work``; returns before the copies have ended."""
        with torch.cuda.stream(self._stream):
            data, on_device = move()
            self._ahead[work] = _Moved(data, on_device, self._stream.record_event())

    def take(self, work: Work, move: Move) -> Any:
        """The data of ``work``: what was started, else what ``move`` gives now.

        What the current stream does from now on comes after the copies.
        """
        moved = self._ahead.pop(work, None)
        if moved is None:
            return move()[0]
        stream = torch.cuda.current_stream()
        stream.wait_event(moved.done)
        for tensor in moved.on_device:
            # Its memory belongs to the other stream, which must not use it again before this one
            # is done.
            tensor.record_stream(stream)
        return moved.data

    def begin(self) -> None:
        """Begin a step: forget what nobody has taken, and read nothing before it is made.

        A script's iterator may yield tensors of the device, which kernels of the current stream
        have made.
        """
        self._ahead.clear()
        self._stream.wait_stream(torch.cuda.current_stream())
