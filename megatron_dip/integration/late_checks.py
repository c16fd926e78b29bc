"""Megatron's checks of losses and gradients, made when a step has done all else.

Its rerun machine looks at every loss and at every buffer of gradients before it is reduced (NaN,
infinite, far above the usual), and for each the host waits for the device.  Here the values are
noted where they are checked, and looked at in the same order at the end of the step: before the
optimizer, and within what the machine would run again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine

__all__ = ["checked_at_the_end"]


@contextmanager
def checked_at_the_end() -> Iterator[None]:
    """Calls of ``validate_result`` inside take effect when it is left without an exception.

    Raises:
        RuntimeError: A value was refused, and the machine is off (``--rerun-mode disabled``).
    """
    machine = get_rerun_state_machine()
    noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(result: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(result, torch.Tensor):
            # Megatron divides losses in place after their check.
            result = result.detach().clone()
        noted.append((result, args, kwargs))

    machine.validate_result = note
    try:
        yield
    finally:
        del machine.validate_result
    for result, args, kwargs in noted:
        machine.validate_result(result, *args, **kwargs)
