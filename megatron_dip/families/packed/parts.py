"""Which part of its module a parameter belongs to, by its name in a stage.

Parts are named as in a configuration (``part_names`` of its forms): what is trained and at which
learning rate is said by part.
"""

from collections.abc import Iterator, Mapping

import torch

from megatron_dip.costs.trained_parts import LAYERS, TrainedParts
from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.families.packed.stage import StageModule

__all__ = [
    "choose_trained_parts",
    "learning_rate_factor",
    "part_of",
    "set_learning_rate_factor",
    "set_learning_rate_factors",
]

_BLOCK = "decoder"
_FACTOR = "dip_learning_rate_factor"
_PARTS = {
    "embedding": "embedding",
    "patch_embedding": "embedding",
    "position_table": "embedding",
    "conv_in": "embedding",
    "conv_out": "embedding",
    "text_projection": "text_projection",
    "time_in": "time",
    "time_out": "time",
    "modulation": "time",
    "final_layernorm": "norm",
    "output_layer": "head",
    "output_modulation": "output",
    "output": "output",
}


def part_of(name: str) -> tuple[str, int | None]:
    """The part of the parameter called ``name``, and the number of its layer if it is in one.

    Args:
        name: As :func:`named_global_parameters` has it: ``vision_model.decoder.layers.3...``.
    """
    root, _, rest = name.partition(".")
    if root.endswith("_projection"):
        return "projector", None
    words = rest.split(".")
    if words[0] == _BLOCK:
        words = words[1:]
    if words[0] == LAYERS:
        return LAYERS, int(words[1])
    return _PARTS[words[0]], None


def _with_parts(stage: StageModule) -> Iterator[tuple[torch.nn.Parameter, str, int | None]]:
    for name, parameter in named_global_parameters(stage):
        yield parameter, *part_of(name)


def choose_trained_parts(stage: StageModule, trained: TrainedParts) -> None:
    """Let what ``trained`` names be trained, and nothing else.

    Call it before Megatron's wrappers are put on: they look at it once.
    """
    for parameter, part, layer in _with_parts(stage):
        is_trained = part in trained.parts
        if layer is not None:
            is_trained = any(layer in layers for layers in trained.layers)
        parameter.requires_grad_(is_trained)


def set_learning_rate_factors(stage: StageModule, factors: Mapping[str, float]) -> None:
    """Note by what the learning rate of every trained parameter is multiplied.

    Args:
        factors: By part; a part that is not named has 1.
    """
    for parameter, part, _ in _with_parts(stage):
        if parameter.requires_grad:
            setattr(parameter, _FACTOR, factors.get(part, 1.0))


def set_learning_rate_factor(stage: StageModule, factor: float) -> None:
    """Note one factor for all that is trained in ``stage``, whatever part it belongs to."""
    for parameter in stage.parameters():
        if parameter.requires_grad:
            setattr(parameter, _FACTOR, factor)


def learning_rate_factor(parameter: torch.nn.Parameter) -> float:
    """What was noted for ``parameter``; 1 where nothing was."""
    return float(getattr(parameter, _FACTOR, 1.0))
