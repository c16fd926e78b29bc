"""The families of models: one module each, under the names of ``megatron_dip.config.FAMILIES``."""

from typing import Any

from megatron_dip.config import DipConfig, VlmConfig
from megatron_dip.integration.families.base import ModelFamily, SampleSet, StageFactory
from megatron_dip.integration.families.vlm import VlmFamily

__all__ = ["ModelFamily", "SampleSet", "StageFactory", "family_of"]


def family_of(config: DipConfig) -> ModelFamily[Any]:
    """The family whose form ``config`` has."""
    families: dict[type[DipConfig], ModelFamily[Any]] = {VlmConfig: VlmFamily()}
    return families[type(config)]
