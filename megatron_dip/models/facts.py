"""Facts of built stages: how many weights there are in every layer, and which are trained.

Works on any class of model: the layers are found as modules that carry Megatron's ``layer_number``,
or else as the list of modules that holds most weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.costs.weights import PartWeights, StageFacts
from megatron_dip.errors import UnsupportedError
from megatron_dip.models.staged import Part

__all__ = ["gather_facts", "read_facts"]


def read_facts(chunk: torch.nn.Module, part: Part) -> StageFacts:
    """What a built stage holds, before Megatron wraps it.

    Weights outside of layers are those before the first layer, in the order of registration, where
    the stage holds that end of its module, else those after the last.  Other stages must have none
    that are trained: every copy of them would be trained by itself.

    Raises:
        UnsupportedError: The stage does not have the layers that it should have, or weights that
            are trained and belong to no layer and no end of the module.
    """
    layers = _layers(chunk, part)
    of_layer = {
        id(weight): number for number, layer in layers.items() for weight in layer.parameters()
    }
    held = dict.fromkeys(part.layers, PartWeights())
    before, after = PartWeights(), PartWeights()
    is_behind = False
    for name, weight in chunk.named_parameters():
        own = _weights(name, weight)
        number = of_layer.get(id(weight))
        if number is not None:
            held[number] = held[number].plus(own)
            is_behind = True
        elif part.first and not (is_behind and part.last):
            before = before.plus(own)
        elif part.last:
            after = after.plus(own)
        elif own.is_trained:
            raise UnsupportedError(
                f"{type(chunk).__name__}: {name} is trained and lies in the stage of layers "
                f"[{part.first_layer}, {part.layers.stop}) of {part.module}, which holds neither "
                f"end of it (expected such weights in the first or the last stage alone)"
            )
        else:
            before = before.plus(own)
    return StageFacts(part.module, part.first_layer, tuple(held.values()), before, after)


def gather_facts(
    own: Sequence[StageFacts], group: dist.ProcessGroup | None
) -> tuple[StageFacts, ...]:
    """Facts of all stages of a pipeline; a collective call of its ranks.

    Args:
        own: Of the stages of this rank.
        group: The ranks of the pipeline.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, tuple(own), group=group)
    return tuple(facts for of_rank in gathered for facts in of_rank)


def _weights(name: str, weight: torch.nn.Parameter) -> PartWeights:
    is_trained, is_expert = weight.requires_grad, "experts" in name.split(".")
    found = [0, 0, 0, 0]
    found[2 * is_expert + (not is_trained)] = weight.numel()
    return PartWeights(*found)


def _layers(chunk: torch.nn.Module, part: Part) -> Mapping[int, torch.nn.Module]:
    """The stage's layers by their numbers in the module, counted from 0."""
    if not part.num_layers:
        return {}
    found = _numbered_layers(chunk, part) or _listed_layers(chunk, part)
    if found is None:
        raise UnsupportedError(
            f"{type(chunk).__name__}: the stage of layers [{part.first_layer}, "
            f"{part.layers.stop}) of {part.module} has no list of modules that holds them "
            f"(expected layers with a layer_number, or a list of the stage's or of all layers)"
        )
    return found


def _numbered_layers(chunk: torch.nn.Module, part: Part) -> Mapping[int, torch.nn.Module] | None:
    for block in chunk.modules():
        if isinstance(block, torch.nn.ModuleList):
            numbers = [getattr(layer, "layer_number", None) for layer in block]
            if numbers == [number + 1 for number in part.layers]:
                return dict(zip(part.layers, block, strict=True))
    if part.num_layers == 1:
        # A module that is one layer as a whole is in no list.
        for module in chunk.modules():
            if getattr(module, "layer_number", None) == part.layers.stop:
                return {part.first_layer: module}
    return None


def _listed_layers(chunk: torch.nn.Module, part: Part) -> Mapping[int, torch.nn.Module] | None:
    """Of foreign blocks: a list that holds this stage's layers alone, or all at their numbers."""
    lists = [block for block in chunk.modules() if isinstance(block, torch.nn.ModuleList)]
    most = max(lists, key=_num_weights, default=None)
    if most is None:
        return None
    if len(most) == part.num_layers:
        return dict(zip(part.layers, most, strict=True))
    if len(most) >= part.layers.stop:
        return {number: most[number] for number in part.layers}
    return None


def _num_weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
