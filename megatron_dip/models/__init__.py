"""The front door: how a class of model is cut into stages.

Every name here is found in one of the modules of this package when it is asked for, because
Megatron must not be imported before CPU mode is enabled.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dip.costs import Boundary, ItemSize, ItemSizes, ModuleShape
    from megatron_dip.models.batches import join, needed, pick, take
    from megatron_dip.models.boundaries import batched, flat, packed
    from megatron_dip.models.entry import enter, keep_layers, leave, placeholder
    from megatron_dip.models.layout import cut_config, cut_spec
    from megatron_dip.models.module_shapes import module_shape
    from megatron_dip.models.registry import register
    from megatron_dip.models.staged import Part, Received, RunFacts, StagedModel

__all__ = [
    "Boundary",
    "ItemSize",
    "ItemSizes",
    "ModuleShape",
    "Part",
    "Received",
    "RunFacts",
    "StagedModel",
    "batched",
    "cut_config",
    "cut_spec",
    "enter",
    "flat",
    "join",
    "keep_layers",
    "leave",
    "module_shape",
    "needed",
    "packed",
    "pick",
    "placeholder",
    "register",
    "take",
]

_HOMES = {
    "megatron_dip.costs": ("Boundary", "ItemSize", "ItemSizes", "ModuleShape"),
    "megatron_dip.models.batches": ("join", "needed", "pick", "take"),
    "megatron_dip.models.boundaries": ("batched", "flat", "packed"),
    "megatron_dip.models.entry": ("enter", "keep_layers", "leave", "placeholder"),
    "megatron_dip.models.layout": ("cut_config", "cut_spec"),
    "megatron_dip.models.module_shapes": ("module_shape",),
    "megatron_dip.models.registry": ("register",),
    "megatron_dip.models.staged": ("Part", "Received", "RunFacts", "StagedModel"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
