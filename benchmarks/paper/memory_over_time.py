"""VLM-M: what rank 0 holds over an iteration.

*Swing* is the most less the least that it holds in the middle three fifths of the iteration, where
the pipeline is full.  Published: our swings are 52.9% smaller than Megatron's, and at the same peak
the iteration is 12.2% faster than with Optimus.
"""

from typing import Any

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner import make_plan
from megatron_dip.simulator import simulate

from .chart import Axis, Series, draw_lines
from .results import Result, markdown, tracked
from .setting import batch_of, partition_of, sample_batches
from .systems import MEGATRON, OPTIMUS, Ran, Systems, ran

__all__ = ["run"]

_MODEL = "vlm_m"
_OURS = "ours"
_PUBLISHED_SWING, _PUBLISHED_FASTER = 0.529, 0.122


def run(quick: bool) -> Result:
    """Both baselines, ours within the limit of the GPU, and ours within Optimus's peaks."""
    size, evaluations = (4, 8) if quick else (64, 400)
    problem, partition = batch_of(_MODEL, 101, size), partition_of(_MODEL)
    systems = Systems(sample_batches(_MODEL, size), partition)
    curves: dict[str, Ran] = {}
    for name in tracked((MEGATRON, OPTIMUS, _OURS), "memory over time"):
        if name == _OURS:
            curves[name] = ran(simulate(make_plan(problem, partition, evaluations=evaluations)))
        else:
            curves[name] = systems.run(name, problem)
    peak_bytes = curves[OPTIMUS].peak_bytes
    limited = problem.model_copy(update={"memory_limit_bytes": peak_bytes})
    try:
        plan = make_plan(limited, partition, evaluations=evaluations)
        curves["ours at Optimus's peak"] = ran(simulate(plan))
    except InfeasibleError as error:
        print(f"ours at Optimus's peak: {error}")
    data: dict[str, Any] = {
        "model": _MODEL,
        "curves": {
            name: {
                "makespan_us": curve.makespan_us,
                "peak_bytes": curve.peak_bytes,
                "swing_bytes": _swing_bytes(curve),
                "seconds_and_gb": _thinned(curve, curve.makespan_us / 1e6),
            }
            for name, curve in curves.items()
        },
        "published": {"smaller_swing": _PUBLISHED_SWING, "faster": _PUBLISHED_FASTER},
    }
    return Result(data=data, table=_table(curves), picture=_picture(curves))


def _swing_bytes(curve: Ran) -> int:
    """In the middle three fifths."""
    first_us, last_us = 0.2 * curve.makespan_us, 0.8 * curve.makespan_us
    before = [held for at_us, held in curve.memory if at_us <= first_us][-1:]
    inside = [held for at_us, held in curve.memory if first_us < at_us < last_us]
    return max(before + inside) - min(before + inside)


def _table(curves: dict[str, Ran]) -> str:
    megatron, optimus = curves[MEGATRON], curves[OPTIMUS]
    return markdown(
        [
            "",
            "iteration, s",
            "faster than Optimus",
            "peak, GB",
            "swing, GB",
            "smaller swing than Megatron's",
        ],
        [
            [
                name,
                f"{curve.makespan_us / 1e6:.2f}",
                f"{optimus.makespan_us / curve.makespan_us - 1:+.1%}",
                f"{curve.peak_bytes[0] / 1e9:.1f}",
                f"{_swing_bytes(curve) / 1e9:.1f}",
                f"{1 - _swing_bytes(curve) / max(1, _swing_bytes(megatron)):.1%}",
            ]
            for name, curve in curves.items()
        ],
    )


def _picture(curves: dict[str, Ran]) -> str:
    longest_s = max(curve.makespan_us for curve in curves.values()) / 1e6
    highest = max(curve.peak_bytes[0] for curve in curves.values()) / 1e9
    ours = curves[_OURS]
    published_gb = (
        ours.peak_bytes[0] - (1 - _PUBLISHED_SWING) * _swing_bytes(curves[MEGATRON])
    ) / 1e9
    middle = [
        (0.2 * ours.makespan_us / 1e6, published_gb),
        (0.8 * ours.makespan_us / 1e6, published_gb),
    ]
    return draw_lines(
        "VLM-M: memory of rank 0 over an iteration",
        Axis("seconds", 0.0, longest_s),
        Axis("GB", 0.0, highest * 1.05),
        [
            *(Series(name, _thinned(curve, longest_s), "steps") for name, curve in curves.items()),
            Series("ours falls to here with the published swing", middle, "dotted line", 6),
        ],
    )


def _thinned(curve: Ran, longest_s: float) -> list[tuple[float, float]]:
    """At most a few hundred points: the highest and the lowest of every moment."""
    moment_s = longest_s / 150
    kept: list[tuple[float, float]] = []
    group: list[tuple[float, float]] = []
    for at_us, held in curve.memory:
        point = (round(at_us / 1e6, 3), round(held / 1e9, 2))
        if group and point[0] - group[0][0] > moment_s:
            extremes = {min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])}
            kept += sorted(extremes)
            group = []
        group.append(point)
    return [*kept, *group, (curve.makespan_us / 1e6, group[-1][1])]
