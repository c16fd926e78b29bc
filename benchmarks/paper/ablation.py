"""VLM-S, one technique after another: what each takes off the iteration.

1. *Megatron*: interleaved, pieces balanced by parameters, whole microbatches.
2. *+ partitioner*: modules cut by themselves, with sub-microbatches; 1F1B on that graph.
3. *+ interleaving*: the dual queue, microbatches in the order of the batch.
4. *+ reordering*: the planner's search for their order.
5. *+ memory*: recomputation chosen per work and layer.

Steps 2 to 4 keep the memory limit as static systems do: the same share of the layers of every stage
is recomputed in all microbatches, the one that is fastest.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.planner import make_plan, search_schedule
from megatron_dip.planner.baselines.on_stages import order_as_given
from megatron_dip.planner.one_f_one_b import order_one_f_one_b
from megatron_dip.simulator import TaskTable
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.workload import Problem

from .chart import Axis, Bars, draw_bars
from .results import Result, markdown, tracked
from .setting import batch_of, chosen_partition_of, partition_of, sample_batches, table_of
from .systems import MEGATRON, Systems, fastest_within_memory

__all__ = ["run"]

_MODEL = "vlm_s"
_STEPS = ("Megatron", "+ partitioner", "+ interleaving", "+ reordering", "+ memory")
_PUBLISHED_S = (26.13, 22.27, 18.81, 17.61, 16.05)
_RULE, _CHOSEN, _HALF = "cut by the rule", "cut by our partitioner", "by the rule, 40 GB"


def run(quick: bool) -> Result:
    """All steps, also on a cut that was searched, and with half of the memory."""
    size, evaluations = (4, 8) if quick else (64, 200)
    fit, problem = sample_batches(_MODEL, size), batch_of(_MODEL, 101, size)
    seconds: dict[str, list[float | None]] = {}
    free_s = 0.0
    for name in tracked((_RULE, _CHOSEN, _HALF), "ablation"):
        partition = chosen_partition_of(_MODEL) if name == _CHOSEN else partition_of(_MODEL)
        limits = problem.memory_limit_bytes
        if name == _HALF:
            limits = tuple(limit // 2 for limit in limits)
        limited = problem.model_copy(update={"memory_limit_bytes": limits})
        systems = Systems(fit, partition)
        free_s = systems.megatron_without_limit_us(problem) / 1e6
        seconds[name] = [
            None if time_us is None else time_us / 1e6
            for time_us in _steps_us(limited, partition, systems, evaluations)
        ]
    data: dict[str, Any] = {
        "model": _MODEL,
        "evaluations": evaluations,
        "steps": _STEPS,
        "published_s": _PUBLISHED_S,
        "seconds": seconds,
        "megatron_without_limit_s": free_s,
    }
    return Result(data=data, table=_table(seconds, free_s), picture=_picture(seconds))


def _steps_us(
    problem: Problem, partition: Partition, systems: Systems, evaluations: int
) -> list[float | None]:
    """None where a step cannot keep the memory limit."""
    table = table_of(problem, partition)
    plan = make_plan(problem, partition, evaluations=evaluations)
    assert plan.estimate is not None

    def one_f_one_b(limited: TaskTable) -> TaskOrder:
        return order_one_f_one_b(limited, split_backward=False)

    def searched(limited: TaskTable) -> TaskOrder:
        return search_schedule(limited, evaluations=evaluations, memory_program=False).order

    found: list[float | None] = []
    runs: list[Callable[[], float]] = [
        lambda: systems.run(MEGATRON, problem).makespan_us,
        *(
            partial(lambda order: fastest_within_memory(table, order).makespan_us, order)
            for order in (one_f_one_b, order_as_given, searched)
        ),
    ]
    for run_step in runs:
        try:
            found.append(run_step())
        except InfeasibleError:
            found.append(None)
    return [*found, plan.estimate.makespan_us]


def _table(seconds: dict[str, list[float | None]], free_s: float) -> str:
    names = list(seconds)

    def cells(values: list[float | None], step: int) -> list[str]:
        value, first = values[step], values[0]
        if value is None or first is None:
            return ["-" if value is None else f"{value:.2f}", "-"]
        return [f"{value:.2f}", f"{value / first:.3f}"]

    rows = [
        [
            step,
            *(cell for name in names for cell in cells(seconds[name], number)),
            f"{_PUBLISHED_S[number]:.2f}",
            f"{_PUBLISHED_S[number] / _PUBLISHED_S[0]:.3f}",
        ]
        for number, step in enumerate(_STEPS)
    ]
    free = (cell for name in names for cell in cells([free_s, seconds[name][0]][::-1], 1))
    rows.append(["Megatron without a memory limit", *free, "", ""])
    heads = [head for name in names for head in (f"{name}, s", "of Megatron")]
    return markdown(["", *heads, "published, s", "of Megatron"], rows)


def _picture(seconds: dict[str, list[float | None]]) -> str:
    published = [value / _PUBLISHED_S[0] for value in _PUBLISHED_S]
    groups = [
        Bars(
            name,
            [None if v is None or values[0] is None else v / values[0] for v in values],
            published,
        )
        for name, values in seconds.items()
    ]
    highest = max(value or 0.0 for group in groups for value in group.values)
    return draw_bars(
        "VLM-S: iteration time, one technique after another",
        _STEPS,
        Axis("iteration time / Megatron's", 0.0, max(1.2, math.ceil(highest * 5 + 0.2) / 5)),
        groups,
    )
