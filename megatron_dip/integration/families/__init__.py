"""The families of models: one module each, under the names of ``megatron_dip.config.FAMILIES``."""

from typing import Any

from megatron_dip.config import DipConfig, LavinConfig, OmniConfig, T2vConfig, VlmConfig
from megatron_dip.integration.families.base import ModelFamily, SampleSet, SetLengths, StageFactory
from megatron_dip.integration.families.lavin import LavinFamily
from megatron_dip.integration.families.omni import OmniFamily
from megatron_dip.integration.families.t2v import T2vFamily
from megatron_dip.integration.families.vlm import VlmFamily

__all__ = ["ModelFamily", "SampleSet", "SetLengths", "StageFactory", "family_of"]


def family_of(config: DipConfig) -> ModelFamily[Any]:
    """The family whose form ``config`` has."""
    families: dict[type[DipConfig], ModelFamily[Any]] = {
        VlmConfig: VlmFamily(),
        T2vConfig: T2vFamily(),
        OmniConfig: OmniFamily(),
        LavinConfig: LavinFamily(),
    }
    return families[type(config)]
