"""The YAML configuration of a run: the model, its schedule and its data.

``--dip-config FILE`` reads one.  It states the model once, for Megatron's own schedule as well as
for ours; see ``configs/vlm_tiny.yaml`` for a commented example.  ``family`` names the kind of
model, which has its own forms of ``model`` and ``data``.
"""

from megatron_dip.config.base import (
    CostConfig,
    DataForm,
    DipConfig,
    ModuleSchedule,
    PlanningConfig,
    ScheduleConfig,
    build_partition,
)
from megatron_dip.config.families import FAMILIES, load_config
from megatron_dip.config.lavin import LavinConfig
from megatron_dip.config.omni import OmniConfig
from megatron_dip.config.t2v import T2vConfig
from megatron_dip.config.vlm import VlmConfig

__all__ = [
    "FAMILIES",
    "CostConfig",
    "DataForm",
    "DipConfig",
    "LavinConfig",
    "ModuleSchedule",
    "OmniConfig",
    "PlanningConfig",
    "ScheduleConfig",
    "T2vConfig",
    "VlmConfig",
    "build_partition",
    "load_config",
]
