"""A CUDA device means the CPU: tensor factories and the methods that move tensors.

Plain wrapping costs about 0.3 us per call; a ``TorchFunctionMode`` does the same and costs a fifth
of an iteration.  One difference to a GPU remains: ``tensor.cuda()`` and ``tensor.cpu()`` return the
tensor itself, not a copy.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["cpu_if_cuda", "redirect_devices"]

_CPU = torch.device("cpu")
_FACTORIES = [
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "hann_window",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]
_NEW_METHODS = ["new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"]


def cpu_if_cuda(device: Any) -> Any:
    """The CPU where ``device`` is a CUDA device in any form torch accepts, else ``device`` as is.

    A bare number is a CUDA device: it is what ``torch.cuda.current_device()`` returns.
    """
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def redirect_devices() -> None:
    """Wrap torch's factories and Tensor's methods; to be called once per process."""
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    for name, method in _tensor_methods().items():
        setattr(torch.Tensor, name, method)
    torch.load = _load_on_cpu(torch.load)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = cpu_if_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            # Page-locked memory needs a CUDA driver.
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _load_on_cpu(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint written on GPUs names their devices: without a location, it would not load.
        location = _CPU if map_location is None else cpu_if_cuda(map_location)
        return load(f, location, *args, **kwargs)

    return load_on_cpu


def _tensor_methods() -> dict[str, Callable[..., Any]]:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (cpu_if_cuda(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = cpu_if_cuda(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    def same_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def nothing(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        return None

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare this text with "torch.cuda.FloatTensor" and its like.
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        elif getattr(dtype, "__module__", "") == "torch.cuda":
            dtype = f"torch.{dtype.__name__}"
        return tensor_type(self, dtype, *args, **kwargs)

    return {
        "to": to,
        "type": type_,
        "cuda": same_tensor,
        "pin_memory": same_tensor,
        "record_stream": nothing,
    }
