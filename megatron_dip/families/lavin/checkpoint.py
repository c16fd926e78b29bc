"""Checkpoints of adapters alone, with the identity of the towers that they were tuned for.

Adapters are whole on every tensor-parallel rank and belong to layers, so what the stages of a
pipeline hold is put together on one rank and loaded under any other layout.  The identity of the
towers is a SHA-256 over names and values of all frozen parameters, in bfloat16: runs in 16 and in
32 bits from the same weights agree on it.

All functions that take a ``group`` are collective calls of its ranks: those that share one model.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dip.errors import CheckpointError
from megatron_dip.families.lavin.adapter_file import (
    is_own_form,
    own_adapters,
    read_adapter_file,
    write_adapters,
)
from megatron_dip.families.lavin.released import from_released
from megatron_dip.families.lavin.stages import is_adapter
from megatron_dip.families.packed.initialization import full_tensor, named_global_parameters
from megatron_dip.families.packed.stage import StageModule, check_weights

__all__ = ["base_digest", "gather_adapters", "load_adapters", "save_adapters"]

logger = logging.getLogger(__name__)

_NUM_SHOWN = 3


def base_digest(stages: Sequence[StageModule], group: dist.ProcessGroup | None = None) -> str:
    """The identity of the frozen towers; one parameter at a time is made whole."""
    own = {}
    for stage in stages:
        for name, parameter in named_global_parameters(stage):
            if not is_adapter(name):
                whole = full_tensor(parameter, stage.tp_group).detach().bfloat16().contiguous()
                values = whole.view(torch.int16).cpu().numpy()
                own[name] = hashlib.sha256(values.tobytes()).hexdigest()
    digest = hashlib.sha256()
    for name, value in sorted(_union(own, group).items()):
        digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()


def gather_adapters(
    stages: Sequence[StageModule], group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """All adapters of the model, by global name, in 32 bits on the CPU."""
    own = {
        name: parameter.detach().float().cpu()
        for stage in stages
        for name, parameter in named_global_parameters(stage)
        if is_adapter(name)
    }
    return _union(own, group)


def _union(own: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    if group is None:
        return own
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group=group)
    return {name: value for part in parts for name, value in part.items()}


def save_adapters(
    path: str | Path,
    stages: Sequence[StageModule],
    group: dist.ProcessGroup | None = None,
    *,
    released: bool = False,
) -> None:
    """Write the adapters; the first rank of ``group`` does.

    Args:
        released: With the names and shapes of released checkpoints, without the towers' identity.

    Raises:
        CheckpointError: The file cannot be written.
    """
    digest = "" if released else base_digest(stages, group)
    adapters = gather_adapters(stages, group)
    if group is not None and dist.get_rank(group) != 0:
        return
    write_adapters(path, adapters, None if released else digest)


def load_adapters(
    path: str | Path, stages: Sequence[StageModule], group: dist.ProcessGroup | None = None
) -> None:
    """Put the adapters in ``path`` into ``stages``: ours or a released checkpoint.

    Everything is checked before the first value is changed.

    Raises:
        CheckpointError: The file cannot be read, was made for other towers, or does not hold
            exactly the adapters of this model.
    """
    content = read_adapter_file(Path(path))
    if is_own_form(content):
        found = _check_own(content, base_digest(stages, group), str(path))
    else:
        logger.warning(
            "%s is a released checkpoint, which does not say for which towers it was made", path
        )
        found = from_released(content["model"], str(path))
    expected = {name: tuple(value.shape) for name, value in gather_adapters(stages, group).items()}
    _check_names_and_shapes(found, expected, str(path))
    for stage in stages:
        for name, parameter in named_global_parameters(stage):
            if is_adapter(name):
                parameter.data.copy_(found[name])


def _check_own(content: Mapping[str, Any], digest: str, source: str) -> dict[str, Tensor]:
    adapters, base = own_adapters(content, source)
    if base != digest:
        raise CheckpointError(
            f"{source}: these adapters were tuned for other towers (their digest is "
            f"{base[:12]}, that of this model {digest[:12]}): load the weights that they were made "
            f"with"
        )
    return adapters


def _check_names_and_shapes(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    for what, names in (("lacks", missing), ("holds, beside this model's,", unknown)):
        if names:
            raise CheckpointError(
                f"{source}: {what} {len(names)} parameters: {', '.join(names[:_NUM_SHOWN])} (its "
                f"model has another number of layers, or it is not complete)"
            )
    for name, shape in expected.items():
        check_weights({name: found[name]}, source)
        if tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(found[name].shape)} (expected {list(shape)}: "
                f"its model has another width)"
            )
