"""How long actions took against what their plans said."""

from collections.abc import Iterable
from statistics import median

from megatron_dip.plan import Plan
from megatron_dip.report.traces import IterationTrace
from megatron_dip.simulator import simulate

__all__ = ["module_slowness"]


def module_slowness(iterations: Iterable[tuple[IterationTrace, Plan]]) -> dict[str, float]:
    """Per module, the median over its compute actions of measured over predicted time.

    Args:
        iterations: Traces of plans, each with the plan that was run.
    """
    ratios: dict[str, list[float]] = {}
    for trace, plan in iterations:
        predicted = {
            str(timed.action): (plan.partition[timed.action.stage].module, timed)
            for line in simulate(plan).timelines
            for timed in line
            if timed.action.type.is_compute
        }
        for rank in trace.ranks:
            for span in rank.spans:
                if span.label in predicted and not span.is_wait:
                    module, timed = predicted[span.label]
                    expected = timed.end_us - timed.start_us
                    if expected > 0.0:
                        ratios.setdefault(module, []).append(span.duration_us / expected)
    return {module: median(values) for module, values in ratios.items()}
