"""The YAML configuration of a schedule: the cut, the planner, its costs, planning beside training.

``--dip-config FILE`` reads one; see ``configs/vlm_tiny.yaml`` for a commented example, in which a
script of ``examples/`` finds its model and data, too.
"""

from megatron_dip.config.load import load_dip_config, resolve_schedule
from megatron_dip.config.schedule import (
    CostConfig,
    DipConfig,
    ModuleSchedule,
    OffloadConfig,
    PlanningConfig,
    ScheduleConfig,
    build_partition,
)

__all__ = [
    "CostConfig",
    "DipConfig",
    "ModuleSchedule",
    "OffloadConfig",
    "PlanningConfig",
    "ScheduleConfig",
    "build_partition",
    "load_dip_config",
    "resolve_schedule",
]
