"""Copies from the host to the device for which the host does not wait.

A copy from pageable memory goes through a buffer of the driver, for which the host waits until the
device has done all that was queued before.  From page-locked memory it is one more piece of queued
work.  So everything that stages read of the host goes through :func:`to_device`.
"""

import torch

__all__ = ["to_device"]


def to_device(
    tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``tensor`` on ``device``, queued on the current stream; itself where it is there.

    Args:
        tensor: On any device.  Memory of the host that is not page-locked is copied to such first.
        device: The target.
        dtype: In which it travels; its own where None.
    """
    target = torch.device(device)
    if tensor.device.type == target.type:
        return tensor if dtype is None else tensor.to(dtype)
    if target.type == "cuda":
        # Torch keeps page-locked memory for the next copy once this one has ended.
        if dtype not in (None, tensor.dtype):
            tensor = torch.empty_like(tensor, dtype=dtype, pin_memory=True).copy_(tensor)
        elif not tensor.is_pinned():
            tensor = tensor.pin_memory()
    return tensor.to(target, dtype=dtype, non_blocking=True)
