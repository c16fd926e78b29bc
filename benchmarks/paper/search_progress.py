"""How far four searches come in equal processor time.

The share of the lower bound that the best schedule so far reaches, mean over batches and seeds.
Published: within 10 s on many cores the tree search is near the optimum for VLM-L, ahead of random
and depth-first search.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from megatron_dip.planner import search_schedule
from megatron_dip.simulator.bounds import lower_bound_us

from .chart import Axis, Series, draw_lines
from .results import Result, markdown, tracked
from .searches import SEARCHES, ClockedEvaluator
from .setting import batch_of, partition_of, table_of

__all__ = ["run"]

_MODEL = "vlm_l"
_PUBLISHED_S = 10.0
_SHOWN_S = (0.1, 0.3, 1.0, 3.0, 10.0)


def run(quick: bool) -> Result:
    """All searches; ``quick`` on few microbatches for a moment."""
    budget_s, seeds = (0.2, [1]) if quick else (10.0, [1, 2])
    grid = np.geomspace(0.03, budget_s, 60)
    curves: dict[str, list[list[float]]] = {name: [] for name in SEARCHES}
    # Compiling, or reading what was compiled, is no part of the times.
    search_schedule(table_of(batch_of(_MODEL, 100, 8), partition_of(_MODEL)), evaluations=90)
    for name, seed in tracked([(n, s) for n in SEARCHES for s in seeds], "search progress"):
        problem = batch_of(_MODEL, 100 + seed, 8 if quick else 64)
        table = table_of(problem, partition_of(_MODEL))
        bound_us = lower_bound_us(table)
        evaluator = ClockedEvaluator(table, budget_s, bound_us)
        SEARCHES[name](evaluator, seed)
        curves[name].append([_reached(evaluator.progress, bound_us, at) for at in grid])
    means = {
        name: [statistics.mean(column) for column in zip(*rows, strict=True)]
        for name, rows in curves.items()
    }
    return Result(
        data={"model": _MODEL, "seconds": grid.tolist(), "of_bound": means, "seeds": seeds},
        table=_table(grid.tolist(), means, budget_s),
        picture=_picture(grid.tolist(), means),
    )


def _reached(progress: Sequence[tuple[float, float]], bound_us: float, at_s: float) -> float:
    found = [makespan_us for seconds, makespan_us in progress if seconds <= at_s]
    return bound_us / found[-1] if found else 0.0


def _table(grid: Sequence[float], means: dict[str, list[float]], budget_s: float) -> str:
    shown = [second for second in _SHOWN_S if second <= budget_s]
    places = [int(np.searchsorted(grid, second * 0.999)) for second in shown]
    return markdown(
        ["of the bound after", *(f"{second:g} s" for second in shown)],
        [
            [name, *(f"{values[place]:.3f}" if values[place] else "-" for place in places)]
            for name, values in means.items()
        ],
    )


def _picture(grid: Sequence[float], means: dict[str, list[float]]) -> str:
    series = [
        Series(name, [(x, y) for x, y in zip(grid, values, strict=True) if y], "steps")
        for name, values in means.items()
    ]
    lowest = min(y for one in series for _, y in one.points)
    end = [(_PUBLISHED_S, 0.0), (_PUBLISHED_S, 1.0)]
    series.append(
        Series("published: tree search near the optimum (at most 64 cores)", end, "dotted line", 6)
    )
    return draw_lines(
        f"{_MODEL.replace('_', '-').upper()}: the best schedule so far",
        Axis("processor time of one core, s", grid[0], 12.0, is_log=True),
        Axis("lower bound / iteration time", np.floor(lowest * 50) / 50, 1.0),
        series,
    )
