"""Names and shapes of adapters in released LaVIN checkpoints, and the way from and to ours.

A released checkpoint is a ``torch.save`` of ``{"model": {name: tensor}, ...}``; names may begin
with ``module.``, as data parallelism leaves them.  The layers of an adapter are convolutions over
one row there, with weights of [outputs, inputs / groups, 1]; they are linear layers here.  Router,
neck and table have the same shapes in both.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dip.errors import CheckpointError

__all__ = ["from_released", "to_released"]

_TOWERS = {
    "language_model.decoder.layers": "layers",
    "vision_model.decoder.layers": "backbone.visual.transformer.resblocks",
}
_NECK = {"inner": "conv_A", "outer": "conv_B"}
_EXPERTS = ("conv_B", "conv_D")
_TABLE, _RELEASED_TABLE = "adapter_modality.weight", "adapter_modality_embedding.weight"
_OURS = re.compile(
    r"(?P<tower>[a-z_.]+)\.(?P<layer>\d+)\.input_layernorm\.adapter\."
    r"(?P<part>down|up|router)\.(?P<kind>weight|bias)"
)
_RELEASED = re.compile(
    r"(?P<tower>[a-z_.]+)\.(?P<layer>\d+)\.adapter_attn\."
    r"(?P<part>conv_A|conv_B|conv_D|expert_weights)\.(?P<kind>weight|bias)"
)
_RELEASED_NECK = re.compile(r"adapter_proj\.(?P<part>conv_[AB])\.(?P<kind>weight|bias)")


def to_released(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by our global names as a released checkpoint has them under ``model``.

    Raises:
        CheckpointError: A name that is none of an adapter's.
    """
    released: dict[str, Tensor] = {}
    for name, tensor in adapters.items():
        if name == _TABLE:
            released[_RELEASED_TABLE] = tensor
        elif name.startswith("adapter_neck."):
            part, kind = name.removeprefix("adapter_neck.").split(".")
            released[f"adapter_proj.{_NECK[part]}.{kind}"] = tensor.contiguous()
        else:
            released.update(_layer_to_released(name, tensor))
    return released


def _layer_to_released(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = _OURS.fullmatch(name)
    if match is None or match["tower"] not in _TOWERS:
        raise CheckpointError(f"{name}: not the name of an adapter's parameter")
    prefix = f"{_TOWERS[match['tower']]}.{match['layer']}.adapter_attn"
    kind = match["kind"]
    if match["part"] == "down":
        return {f"{prefix}.conv_A.{kind}": _as_convolution(tensor)}
    if match["part"] == "router":
        return {f"{prefix}.expert_weights.{kind}": tensor}
    return {
        f"{prefix}.{expert}.{kind}": _as_convolution(tensor[number])
        for number, expert in enumerate(_EXPERTS)
    }


def _as_convolution(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1).contiguous() if tensor.dim() == 2 else tensor.contiguous()


def from_released(released: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A released checkpoint's ``model`` by our names; parameters of the towers are left out.

    Args:
        source: What messages call the checkpoint.

    Raises:
        CheckpointError: An adapter's name is not known, its value is no tensor, or only one of two
            experts is there, or they differ in shape.
    """
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, Tensor]] = {}
    ours = {theirs: name for name, theirs in _TOWERS.items()}
    neck = {theirs: name for name, theirs in _NECK.items()}
    for name, tensor in released.items():
        name = name.removeprefix("module.")
        if "adapter" not in name:
            continue
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source}: {name} is a {type(tensor).__name__}, not a tensor")
        match, neck_match = _RELEASED.fullmatch(name), _RELEASED_NECK.fullmatch(name)
        if name == _RELEASED_TABLE:
            found[_TABLE] = tensor
        elif neck_match:
            target = f"adapter_neck.{neck[neck_match['part']]}.{neck_match['kind']}"
            # Linear in the released code; exports of earlier versions of this package are not.
            found[target] = _as_linear(tensor)
        elif match and match["tower"] in ours:
            prefix = f"{ours[match['tower']]}.{match['layer']}.input_layernorm.adapter"
            if match["part"] in _EXPERTS:
                target = f"{prefix}.up.{match['kind']}"
                experts.setdefault(target, {})[match["part"]] = _as_linear(tensor)
            else:
                part = "down" if match["part"] == "conv_A" else "router"
                found[f"{prefix}.{part}.{match['kind']}"] = _as_linear(tensor)
        else:
            raise CheckpointError(
                f"{source}: {name} is not an adapter of LaVIN (expected layers.N.adapter_attn..., "
                f"adapter_proj... or adapter_modality_embedding.weight)"
            )
    for target, parts in experts.items():
        if set(parts) != set(_EXPERTS):
            raise CheckpointError(
                f"{source}: of {target} only {sorted(parts)} is there (expected {list(_EXPERTS)})"
            )
        shapes = [list(parts[expert].shape) for expert in _EXPERTS]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{source}: the two experts of {target} have shapes {shapes}")
        found[target] = torch.stack([parts[expert] for expert in _EXPERTS])
    return found


def _as_linear(tensor: Tensor) -> Tensor:
    return tensor.squeeze(-1) if tensor.dim() == 3 else tensor
