"""Initial weights that do not depend on how a model is laid out over ranks.

Every value is a function of the run's seed, the parameter's global name and its place in the full
parameter (``counter_random``); a tensor-parallel rank draws its shard and nothing else.  Runs with
other cuts, pipeline sizes or tensor-parallel sizes then start from the same weights.  Shards are
drawn in 32 bits on the CPU, one at a time.  Experts are named by their numbers among all experts,
so that it makes no difference how they are divided among ranks.

Which distribution a weight has stays Megatron's choice: ``init_method`` of the module's config,
``output_layer_init_method`` (scaled by depth) for the last linear layer of each residual branch,
``embedding_init_method`` for word embeddings.  Biases are zero, norms stay as constructed.
A stage may name other distributions for parameters that Megatron does not know.  All are stated as
functions of ``torch.nn.init``, which are read here and not called: those draw from one generator,
value after value.
"""

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.counter_random import draw_normal, draw_uniform
from megatron_dip.families.packed.stage import StageModule

__all__ = [
    "full_tensor",
    "initialize_parameters",
    "named_global_parameters",
    "tensor_parallel_shard",
]

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_HEAD = "language_model.output_layer.weight"


def named_global_parameters(stage: StageModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a stage by names in which layers and experts have their global numbers.

    Both are counted from 0.

    A head that shares its weight with the embedding has the embedding's name.
    """
    renamed = {}
    for name, module in stage.named_modules():
        if isinstance(module, BaseTransformerLayer):
            block = name.rsplit(".", 1)[0]
            renamed[f"{name}."] = f"{block}.{module.layer_number - 1}."
    first_expert = {
        f"{name}.experts.": module.local_expert_indices[0]
        for name, module in stage.named_modules()
        if isinstance(module, BaseMoELayer)
    }
    for name, parameter in stage.named_parameters():
        for prefix, first in first_expert.items():
            if name.startswith(prefix):
                name = _with_global_expert(name, first)
                break
        for local_prefix, global_prefix in renamed.items():
            if name.startswith(local_prefix):
                name = global_prefix + name[len(local_prefix) :]
                break
        if name == _HEAD and stage.share_embeddings_and_output_weights:
            name = _EMBEDDING
        yield name, parameter


def initialize_parameters(stage: StageModule, seed: int) -> None:
    """Give every parameter of ``stage`` its initial value; call it before any wrapper is put on.

    No generator of torch is used.

    Raises:
        UnsupportedError: A parameter whose distribution is not known.
    """
    for name, parameter in named_global_parameters(stage):
        init_method = stage.initial_distribution(name)
        if init_method is None and parameter.dim() == 1:
            if name.endswith("bias"):
                parameter.data.zero_()
            continue
        if init_method is None:
            init_method = _init_method(name, _config_of(stage, name))
        group = stage.pg_collection.expt_tp if _is_expert(name) else stage.tp_group
        shard = _draw_shard(
            parameter, init_method, f"{seed}:{name}", rank=group.rank(), size=group.size()
        )
        parameter.data.copy_(shard)


def tensor_parallel_shard(
    full: Tensor, parameter: torch.nn.Parameter, *, rank: int, size: int
) -> Tensor:
    """The part of ``full`` that tensor-parallel rank ``rank`` of ``size`` holds as ``parameter``.

    Gated layers hold a part of the gate and the same part of the rest: Megatron records that as
    a stride of 2.
    """
    partition = _partition(parameter)
    if partition is None:
        return full
    dimension, stride = partition
    chunk = full.shape[dimension] // (size * stride)
    return torch.cat(full.split(chunk, dim=dimension)[rank::size], dim=dimension)


def full_tensor(parameter: torch.nn.Parameter, group: torch.distributed.ProcessGroup) -> Tensor:
    """The whole of what the tensor-parallel ranks of ``group`` hold as ``parameter``.

    A collective call; the inverse of ``tensor_parallel_shard``.
    """
    partition = _partition(parameter)
    if partition is None or group.size() == 1:
        return parameter.data
    dimension, stride = partition
    shards = [torch.empty_like(parameter.data) for _ in range(group.size())]
    torch.distributed.all_gather(shards, parameter.data.contiguous(), group=group)
    parts = [shard.chunk(stride, dim=dimension) for shard in shards]
    return torch.cat([part[number] for number in range(stride) for part in parts], dim=dimension)


def _partition(parameter: torch.nn.Parameter) -> tuple[int, int] | None:
    """Dimension and stride in which tensor-parallel ranks share a parameter; None if equal."""
    # Attributes that Megatron sets on what it splits.
    marks = vars(parameter)
    if not marks.get("tensor_model_parallel", False):
        return None
    return int(marks["partition_dim"]), int(marks["partition_stride"])


def _full_shape(parameter: torch.nn.Parameter, size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    partition = _partition(parameter)
    if partition is not None:
        shape[partition[0]] *= size
    return tuple(shape)


def _draw_shard(
    parameter: torch.nn.Parameter,
    init_method: Callable[[Tensor], object],
    key: str,
    *,
    rank: int,
    size: int,
) -> Tensor:
    """What a tensor-parallel rank holds of a parameter, float32 on the CPU.

    Raises:
        UnsupportedError: ``init_method`` is none of the distributions that are known.
    """
    shard = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    draw = _distribution(init_method, _full_shape(parameter, size))
    if draw is None:
        return shard.zero_()
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    # Of a vector a row; of more dimensions, all behind the first are columns.
    matrix = shard.reshape(1, -1) if shard.dim() == 1 else shard.flatten(1)
    partition = _partition(parameter)
    if partition is None:
        draw(matrix.numpy(), digest)
        return shard
    dimension, stride = partition
    assert dimension < 2, "Megatron divides weights by rows or columns"
    axis = 1 if shard.dim() == 1 else dimension
    # Gated layers: a part of the gate and the same part of the rest.
    for number, part in enumerate(matrix.chunk(stride, dim=axis)):
        first = [0, 0]
        first[axis] = (number * size + rank) * part.shape[axis]
        draw(part.numpy(), digest, first)
    return shard


def _distribution(
    init_method: Callable[[Tensor], object], full_shape: tuple[int, ...]
) -> Callable[..., None] | None:
    """What draws a part of a parameter; None for zeros.

    Raises:
        UnsupportedError: ``init_method`` is another function than these of ``torch.nn.init``.
    """
    stated = partial(init_method)
    known: Any = stated.func
    if known is torch.nn.init.zeros_:
        return None
    call = inspect.signature(known).bind(None, *stated.args, **stated.keywords)
    call.apply_defaults()
    given = call.arguments
    if known is torch.nn.init.normal_:
        return partial(draw_normal, mean=given["mean"], deviation=given["std"])
    if known is torch.nn.init.uniform_:
        return partial(draw_uniform, low=given["a"], high=given["b"])
    if known is torch.nn.init.xavier_uniform_:
        fans = sum(full_shape[:2]) * math.prod(full_shape[2:])
        bound = given["gain"] * math.sqrt(6 / fans)
        return partial(draw_uniform, low=-bound, high=bound)
    raise UnsupportedError(
        f"no layout-independent initial weights by {init_method!r} (expected normal_, uniform_, "
        f"xavier_uniform_ or zeros_ of torch.nn.init, or a functools.partial of one)"
    )


def _is_expert(name: str) -> bool:
    """Whether a weight is one of those that are divided among expert-parallel ranks."""
    return ".mlp.experts." in name


def _with_global_expert(name: str, first: int) -> str:
    """``name`` with the number among all experts; this rank's are numbered from ``first``."""
    return _LOCAL_EXPERT.sub(lambda found: f".local_experts.{int(found[1]) + first}.", name)


def _config_of(stage: StageModule, name: str) -> TransformerConfig:
    part: TransformerConfig = getattr(stage, name.split(".", 1)[0]).config
    return part


def _init_method(name: str, config: TransformerConfig) -> Callable[[Tensor], object]:
    if _is_expert(name) and _LOCAL_EXPERT.search(name) is None:
        raise UnsupportedError(
            f"no layout-independent initial value for the weight {name} of several experts (leave "
            f"--moe-grouped-gemm out)"
        )
    if name.endswith(_RESIDUAL_OUTPUTS):
        method: Callable[[Tensor], object] = config.output_layer_init_method
    elif name == _EMBEDDING:
        method = config.embedding_init_method
    else:
        method = config.init_method
    return method
