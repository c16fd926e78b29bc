"""What a run measured, read back: traces of both schedules."""

from megatron_dip.report.traces import (
    IterationTrace,
    RankTrace,
    Span,
    read_traces,
)

__all__ = ["IterationTrace", "RankTrace", "Span", "read_traces"]
