"""Measured iterations as panels of a timeline."""

from megatron_dip.errors import PlanError
from megatron_dip.partition import Partition
from megatron_dip.plan import Action
from megatron_dip.report.traces import IterationTrace, Span
from megatron_dip.simulator import timeline

__all__ = ["measured_panel"]

_OTHER_WORK = {"data": "loading data", "plan": "planning"}


def measured_panel(
    trace: IterationTrace, title: str, partition: Partition | None = None
) -> timeline.Panel:
    """What the ranks did, from the first rank's start of the schedule.

    Args:
        trace: One iteration.
        title: Heading of the panel.
        partition: Tells the module of a stage; without one (Megatron's own schedule) the first
            rank holds vision and language layers together, the others language layers.
    """
    return timeline.Panel(
        title=title,
        num_ranks=len(trace.ranks),
        spans=[
            timeline.Span(
                rank.rank,
                _module(span, partition, rank.rank),
                span.label,
                span.start_us - trace.start_us,
                span.end_us - trace.start_us,
                _kind(span),
            )
            for rank in trace.ranks
            for span in rank.spans
        ],
    )


def _action(span: Span) -> Action | None:
    try:
        return Action.parse(span.label)
    except PlanError:
        return None


def _module(span: Span, partition: Partition | None, rank: int) -> str:
    action = _action(span)
    if action is None:
        return _OTHER_WORK.get(span.label, span.label)
    if partition is not None:
        return partition[action.stage].module
    return "vision + language" if rank == 0 else "language"


def _kind(span: Span) -> timeline.SpanKind:
    action = _action(span)
    if span.is_wait:
        return "wait"
    if action is not None and action.type.is_copy:
        return "copy"
    if action is None or not action.type.is_compute:
        return "other"
    return action.type.value  # type: ignore[return-value]
