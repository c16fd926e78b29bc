"""The YAML configuration of a run: its schedule, how it is planned, and a form for its model.

``--dip-config FILE`` reads one; see ``configs/vlm_tiny.yaml`` for a commented example.
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

__all__ = [
    "CostConfig",
    "DataForm",
    "DipConfig",
    "ModuleSchedule",
    "PlanningConfig",
    "ScheduleConfig",
    "build_partition",
]
