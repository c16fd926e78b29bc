"""VLM-S with sub-microbatches of 4 to 32 images.

Small ones pay the start of kernels more often, large ones leave coarser pieces to order.  Per size:
the iteration that the planner finds, and how far the worst of as many random orders of entry is
behind the best one.  Published: 12 images are best; the spread falls from 15.4% to 5.1%; below 8
images the iteration takes up to 12.1% longer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dip.planner import search_schedule
from megatron_dip.planner.entry_orders import EntryOrders
from megatron_dip.planner.evaluator import Budget, Evaluator
from megatron_dip.simulator import TaskTable
from megatron_dip.workload import Problem

from .chart import Axis, Series, draw_lines
from .cuts import IMAGE_PATCHES, PUBLISHED_IMAGES
from .results import Result, markdown, tracked
from .setting import batch_of, partition_of, preset_builder_of, table_of

__all__ = ["run"]

_MODEL = "vlm_s"
_PLAIN, _CURVE = "half of the peak at every size", "kernels that take time to start"
_PUBLISHED_SPREAD = ((4.0, 0.154), (32.0, 0.051))


def run(quick: bool) -> Result:
    """All sizes, at two kinds of rates."""
    sizes = [4, 32] if quick else [4, 6, 8, 10, 12, 16, 20, 24, 32]
    size, num_orders, evaluations = (4, 4, 8) if quick else (64, 60, 150)
    problems = {
        _PLAIN: batch_of(_MODEL, 101, size),
        _CURVE: batch_of(_MODEL, 101, size, preset_builder_of(_MODEL)),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in problems}
    cases = [(name, images) for name in problems for images in sizes]
    for name, images in tracked(cases, "sub-microbatches"):
        table = _table_with(problems[name], images)
        makespan_us = search_schedule(table, evaluations=evaluations).makespan_us
        best_us, worst_us = _random_orders_us(table, num_orders)
        found[name].append(
            {"images": images, "makespan_us": makespan_us, "spread": worst_us / best_us - 1}
        )
    data: dict[str, Any] = {
        "model": _MODEL,
        "sizes": found,
        "published": {"best": PUBLISHED_IMAGES, "spread": _PUBLISHED_SPREAD, "below_8": 0.121},
    }
    return Result(data=data, table=_markdown(found), picture=_picture(found))


def _table_with(problem: Problem, images: int) -> TaskTable:
    return table_of(problem, partition_of(_MODEL), {"vision": images * IMAGE_PATCHES})


def _random_orders_us(table: TaskTable, number: int) -> tuple[float, float]:
    """The best and the worst of random orders of entry, by the dual queue."""
    evaluator = Evaluator(
        table, Budget(evaluations=number + 100), split_backward=False, goal_us=0.0
    )
    orders = EntryOrders(evaluator)
    random = np.random.default_rng(0)
    level = int(np.argmin(orders.default_times_us()))
    times_us = []
    for _ in range(number):
        drawn = orders.upstream_first(random.permutation(len(orders.pairs)).tolist())
        times_us.append(orders.evaluate(drawn, level).makespan_us)
    return min(times_us), max(times_us)


def _over_best(rows: Sequence[dict[str, float]]) -> list[float]:
    best = min(row["makespan_us"] for row in rows)
    return [row["makespan_us"] / best - 1 for row in rows]


def _markdown(found: dict[str, list[dict[str, float]]]) -> str:
    names = list(found)
    over = {name: _over_best(found[name]) for name in names}
    rows = [
        [
            f"{row['images']:.0f}",
            *(
                cell
                for name in names
                for cell in (f"{over[name][place]:+.1%}", f"{found[name][place]['spread']:.1%}")
            ),
        ]
        for place, row in enumerate(found[names[0]])
    ]
    heads = [head for name in names for head in (f"{name}: over the best size", "spread of orders")]
    return markdown(["images", *heads], rows)


def _picture(found: dict[str, list[dict[str, float]]]) -> str:
    series = []
    for number, (name, rows) in enumerate(found.items()):
        images = [row["images"] for row in rows]
        over = list(zip(images, (100 * x for x in _over_best(rows)), strict=True))
        spread = [(row["images"], 100 * row["spread"]) for row in rows]
        series.append(Series(f"time over the best size: {name}", over, colour=number))
        series.append(Series(f"spread of random orders: {name}", spread, "dotted line", number))
    spread_marks = [(images, 100 * share) for images, share in _PUBLISHED_SPREAD]
    series.append(Series("spread, published", spread_marks, "marks", 4))
    series.append(Series("time below 8 images, published", [(6.0, 12.1)], "marks", 3))
    series.append(Series("best size, published", [(float(PUBLISHED_IMAGES), 0.0)], "marks", 5))
    highest = max(y for one in series for _, y in one.points)
    return draw_lines(
        "VLM-S: the size of sub-microbatches",
        Axis("images of a sub-microbatch", 0, 34, ticks=[4, 8, 12, 16, 20, 24, 28, 32]),
        Axis(
            "% of the best size's time, or of the best order's", 0.0, 5 * np.ceil(highest / 5 + 0.1)
        ),
        series,
    )
