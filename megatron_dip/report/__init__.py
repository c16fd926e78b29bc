"""What runs measured, read back: logs, traces, and their panels beside predicted ones."""

from megatron_dip.report.calibration import module_slowness
from megatron_dip.report.local_run import LocalRun, run_local_training
from megatron_dip.report.page import write_report
from megatron_dip.report.panels import measured_panel
from megatron_dip.report.steps import RankRecord, StepRecord, read_records
from megatron_dip.report.traces import IterationTrace, RankTrace, Span, plan_of_trace, read_traces

__all__ = [
    "IterationTrace",
    "LocalRun",
    "RankRecord",
    "RankTrace",
    "Span",
    "StepRecord",
    "measured_panel",
    "module_slowness",
    "plan_of_trace",
    "read_records",
    "read_traces",
    "run_local_training",
    "write_report",
]
