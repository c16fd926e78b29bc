"""What plans are compared with: Megatron-LM's static schedules and relatives of other systems."""

from megatron_dip.planner.baselines.cuts import StaticCuts
from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.registry import (
    Baseline,
    BaselineCase,
    BaselineResult,
    baselines,
    find_baseline,
)
from megatron_dip.planner.baselines.static import (
    StaticRun,
    StaticSimulator,
    run_with_own_recomputation,
    run_within_memory,
)
from megatron_dip.planner.baselines.zero_bubble import run_zero_bubble

__all__ = [
    "Baseline",
    "BaselineCase",
    "BaselineResult",
    "FlatChain",
    "StaticCut",
    "StaticCuts",
    "StaticRun",
    "StaticSimulator",
    "baselines",
    "find_baseline",
    "run_with_own_recomputation",
    "run_within_memory",
    "run_zero_bubble",
]
