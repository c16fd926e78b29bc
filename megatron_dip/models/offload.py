"""Layers whose saved tensors may be moved to the host and back, chosen anew for every forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron_dip.models.layer_forwards import changed_forwards
from megatron_dip.runtime.offload import OffloadedLayers

__all__ = ["offloaded_layers"]


def offloaded_layers(
    chunk: torch.nn.Module, offload: OffloadedLayers | None
) -> AbstractContextManager[None]:
    """While in it, what forwards of the layers of ``offload`` save for backward is its own.

    Args:
        chunk: One stage.
        offload: None where no layer is offloaded.

    Raises:
        ValueError: A layer that this chunk does not hold.
    """
    if offload is None:
        return nullcontext()

    def change(_: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_keeping(*args: Any, **kwargs: Any) -> Any:
            with offload.keeping():
                return forward(*args, **kwargs)

        return forward_keeping

    return changed_forwards(chunk, offload.layers, change, reason="offloaded")
