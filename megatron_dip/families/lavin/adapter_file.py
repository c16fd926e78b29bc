"""Files of adapters: this package's form, and that of released checkpoints.

Ours is a ``torch.save`` of ``{"format", "version", "base", "adapters": {name: tensor}}``, ``base``
being the identity of the towers that the adapters were tuned for.  Nothing here needs a model.
"""

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dip.errors import CheckpointError, shown
from megatron_dip.families.lavin.released import to_released
from megatron_dip.files import write_atomically

__all__ = [
    "export_adapters",
    "is_own_form",
    "own_adapters",
    "read_adapter_file",
    "write_adapters",
]

logger = logging.getLogger(__name__)

_FORMAT = "megatron-dip/lavin-adapters"
_VERSION = 1


def write_adapters(path: str | Path, adapters: Mapping[str, Tensor], base: str | None) -> None:
    """Write ``adapters`` of the towers ``base``; in the released form where that is None.

    Raises:
        CheckpointError: The file cannot be written.
    """
    content: dict[str, Any] = (
        {"model": to_released(adapters)}
        if base is None
        else {"format": _FORMAT, "version": _VERSION, "base": base, "adapters": dict(adapters)}
    )
    path = Path(path)
    try:
        # In memory first: on a full disk torch raises errors of its own, and leaves half a file.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    logger.info("%d adapter parameters written to %s", len(adapters), path)


def read_adapter_file(path: Path) -> Mapping[str, Any]:
    """The content of ``path``, of whichever form.

    Raises:
        CheckpointError: The file cannot be read, or holds neither form.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # Files that are no checkpoints fail in many ways.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if not is_own_form(content) and not isinstance(content.get("model"), Mapping):
        raise CheckpointError(f"{path}: neither adapters of {_FORMAT} nor a released checkpoint")
    weights = content.get("adapters" if is_own_form(content) else "model")
    for name, tensor in weights.items() if isinstance(weights, Mapping) else ():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {shown(name)} is no tensor: the file is damaged")
    return content


def is_own_form(content: Mapping[str, Any]) -> bool:
    """Whether ``content`` is of this package; of a released checkpoint otherwise."""
    return bool(content.get("format") == _FORMAT)


def own_adapters(content: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], str]:
    """Adapters by our names, and the identity of their towers, from a content of our form.

    Raises:
        CheckpointError: Another version, or parts are missing.
    """
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{source}: version {content.get('version')} of adapters (expected {_VERSION})"
        )
    adapters, base = content.get("adapters"), content.get("base")
    if not isinstance(adapters, dict) or not isinstance(base, str):
        raise CheckpointError(f"{source}: 'adapters' or 'base' is missing: the file is damaged")
    return adapters, base


def export_adapters(source: Path, target: Path) -> int:
    """Write the adapters in ``source``, a file of ours, to ``target`` as released ones are.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: A file cannot be read or written, or ``source`` is not of our form.
    """
    content = read_adapter_file(source)
    if not is_own_form(content):
        raise CheckpointError(f"{source}: has the released form already")
    adapters, _ = own_adapters(content, str(source))
    write_adapters(target, adapters, None)
    return sum(tensor.numel() for tensor in adapters.values())
