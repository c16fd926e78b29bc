"""Process groups: NCCL means gloo."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["redirect_process_groups"]


def redirect_process_groups() -> None:
    """Wrap the functions that make groups, and the barrier, which may name a device."""
    wrapped = {
        "init_process_group": _with_gloo(dist.init_process_group),
        "new_group": _with_gloo(dist.new_group),
        "barrier": _without(dist.barrier, "device_ids"),
    }
    for name, function in wrapped.items():
        setattr(dist, name, function)
        setattr(distributed_c10d, name, function)


def _with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_gloo(*args: Any, **kwargs: Any) -> Any:
        # init_process_group takes the backend first, new_group the ranks.
        if args and isinstance(args[0], str):
            args = (_gloo_if_nccl(args[0]), *args[1:])
        elif "backend" in kwargs or function.__name__ == "init_process_group":
            kwargs["backend"] = _gloo_if_nccl(kwargs.get("backend"))
        # Both would be refused: options are NCCL's, and the device is no CUDA device.
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return function(*args, **kwargs)

    return with_gloo


def _gloo_if_nccl(backend: str | None) -> str | None:
    """``backend`` with NCCL replaced; gloo where none is named, as NCCL would be with a GPU."""
    if backend is None or "nccl" in backend:
        return "gloo"
    return backend


def _without(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def without(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return function(*args, **kwargs)

    return without
