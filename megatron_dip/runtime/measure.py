"""Times and stored bytes of one call of a module, on the device that it is on.

Every phase is timed by itself: the forward, the backward of everything, and the backward of the
inputs alone, by which the weights' share is known.  Gradients of weights are added up in a buffer
of their own, as data-parallel training does.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["CallTimes", "StoredBytes", "measure_call", "stored_bytes"]

_WARM_UP_CALLS = 2


class CallTimes(NamedTuple):
    """Least times in microseconds, and the bytes that a backward needs kept."""

    forward_us: float
    backward_us: float
    """Of everything that has a gradient."""
    input_grad_us: float
    """The backward of the inputs alone."""
    stored_bytes: int

    @property
    def weight_grad_us(self) -> float:
        return max(0.0, self.backward_us - self.input_grad_us)

    def least(self, other: "CallTimes") -> "CallTimes":
        """Of two measurements of the same call."""
        return CallTimes(
            min(self.forward_us, other.forward_us),
            min(self.backward_us, other.backward_us),
            min(self.input_grad_us, other.input_grad_us),
            min(self.stored_bytes, other.stored_bytes),
        )


class StoredBytes:
    """Bytes of tensors that autograd keeps for backward, each memory once, parameters not counted.

    Held bytes fall when backward frees what it has used.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._references: dict[int, int] = {}
        self.held = 0
        self.peak = 0

    @contextmanager
    def counting(self) -> Any:
        """Count what forwards inside keep."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._parameters or not storage.nbytes():
            return _Kept(tensor, None, 0, 0)
        if not self._references.get(address):
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self._references[address] = self._references.get(address, 0) + 1
        return _Kept(tensor, self, address, storage.nbytes())

    def release(self, address: int, num_bytes: int) -> None:
        """One keeper of this memory less."""
        self._references[address] -= 1
        if not self._references[address]:
            del self._references[address]
            self.held -= num_bytes


class _Kept:
    """A kept tensor; its end is the end of the keeping."""

    def __init__(
        self, tensor: Tensor, owner: StoredBytes | None, address: int, num_bytes: int
    ) -> None:
        self.tensor = tensor
        self._owner, self._address, self._num_bytes = owner, address, num_bytes

    def __del__(self) -> None:
        if self._owner is not None:
            self._owner.release(self._address, self._num_bytes)


def stored_bytes(call: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that ``call`` leaves for its backward; its output and its inputs count where kept."""
    counter = StoredBytes(parameters)
    with counter.counting():
        output = call()
    held = counter.held
    del output
    return held


def measure_call(
    call: Callable[[], Tensor],
    *,
    inputs: Sequence[Tensor],
    parameters: Sequence[torch.nn.Parameter],
    device: torch.device,
    repetitions: int,
    seconds: float,
) -> CallTimes:
    """The least times of ``call`` and of its backwards: other programs only ever add to them.

    Args:
        call: A forward of ``inputs`` (leaves) and ``parameters``.
        inputs: Tensors whose gradients a stage hands on; may be none.
        parameters: Trained ones are those that require gradients.
        device: Where it computes.
        repetitions: Calls to time, at most.
        seconds: After this no further call is timed; at least one is, after the warm-up.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has_backward = bool(trained or inputs)
    kept = stored_bytes(call, parameters) if has_backward else 0
    with _added_up(trained):
        forward, whole = _least_times(call, inputs, device, has_backward, repetitions, seconds / 2)
    input_grad = whole
    if trained:
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            _, input_grad = (
                _least_times(call, inputs, device, True, repetitions, seconds / 2)
                if inputs
                else (0.0, 0.0)
            )
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
    return CallTimes(forward, whole, input_grad, kept)


def _least_times(
    call: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    device: torch.device,
    has_backward: bool,
    repetitions: int,
    seconds: float,
) -> tuple[float, float]:
    """Of forward and backward."""
    forwards: list[float] = []
    backwards: list[float] = []
    deadline = time.monotonic() + seconds
    for number in range(repetitions + _WARM_UP_CALLS):
        for tensor in inputs:
            tensor.grad = None
        with torch.set_grad_enabled(has_backward):
            start = _now_us(device)
            output = call()
            middle = _now_us(device)
        if has_backward:
            grad = torch.ones_like(output)
            start_backward = _now_us(device)
            torch.autograd.backward(output, grad)
            backwards.append(_now_us(device) - start_backward)
        forwards.append(middle - start)
        if number >= _WARM_UP_CALLS and time.monotonic() > deadline:
            break
    counted = slice(_WARM_UP_CALLS, None)
    return min(forwards[counted]), min(backwards[counted], default=0.0)


def _now_us(device: torch.device) -> float:
    """A clock that stops for nothing but the call: when a GPU has done all that it was given; on a
    CPU the processor's own time where one process computes alone, because others may share it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif not (dist.is_initialized() and dist.get_world_size() > 1):
        return time.process_time_ns() / 1000.0
    return time.perf_counter_ns() / 1000.0


@contextmanager
def _added_up(trained: Sequence[torch.nn.Parameter]) -> Any:
    handles = []
    for parameter in trained:
        total = torch.zeros_like(parameter)

        def add(parameter: Tensor, total: Tensor = total) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad)
            parameter.grad = None

        handles.append(parameter.register_post_accumulate_grad_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
