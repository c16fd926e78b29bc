"""The families of models: one module each, under the names of ``megatron_dip.config.FAMILIES``."""

from typing import Any

from megatron_dip.families.base import ModelFamily, SampleSet, SetLengths, StageFactory
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.lavin.config import LavinConfig
from megatron_dip.families.lavin.model import LavinFamily
from megatron_dip.families.omni.config import OmniConfig
from megatron_dip.families.omni.model import OmniFamily
from megatron_dip.families.t2v.config import T2vConfig
from megatron_dip.families.t2v.model import T2vFamily
from megatron_dip.families.vlm.config import VlmConfig
from megatron_dip.families.vlm.model import VlmFamily

__all__ = ["ModelFamily", "SampleSet", "SetLengths", "StageFactory", "family_of"]


def family_of(config: FamilyConfig) -> ModelFamily[Any]:
    """The family whose form ``config`` has."""
    families: dict[type[FamilyConfig], ModelFamily[Any]] = {
        VlmConfig: VlmFamily(),
        T2vConfig: T2vFamily(),
        OmniConfig: OmniFamily(),
        LavinConfig: LavinFamily(),
    }
    return families[type(config)]
