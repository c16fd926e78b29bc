"""How the time of a search grows with the number of microbatches, beside exact solvers.

Exact solvers get the order of small batches as a job shop (``exact_models.py``) and have to prove
that theirs is the best.  The planner's search has to reach that; where no solver ends, it has to
come within 1% of the best that anything finds.  Published: Z3 and Gurobi do not end beyond about 10
microbatches.
"""

from typing import Any

from megatron_dip.partition import Partition, uniform_partition
from megatron_dip.planner import search_schedule
from megatron_dip.simulator.bounds import lower_bound_us
from megatron_dip.simulator.tasks import TaskTable

from .chart import Axis, Series, draw_lines
from .exact_models import JobShop, Solved, has_cp_sat, solve_cp_sat, solve_highs
from .results import Result, markdown, tracked
from .searches import SEARCHES, ClockedEvaluator
from .setting import batch_of, table_of

__all__ = ["run"]

_MODEL = "vlm_s"
_UNLIMITED_BYTES = 10**15
_CLOSE = 0.01
"""Over the best that is known."""
_PUBLISHED_END = 10


def run(quick: bool) -> Result:
    """Batches of 1 to 64 microbatches; a solver that did not end is not asked for larger ones."""
    limit_s, sizes = (1.0, [1, 2]) if quick else (20.0, [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32, 64])
    solvers = {"HiGHS": solve_highs}
    if has_cp_sat():
        solvers["CP-SAT (OR-tools)"] = solve_cp_sat
    rows: list[dict[str, Any]] = []
    for size in tracked(sizes, "exact solvers"):
        table = _table(size)
        bound_us = lower_bound_us(table)
        known_us = search_schedule(table, evaluations=100 if quick else 1500).makespan_us
        shop = JobShop.of(table, bound_us, known_us)
        solved: dict[str, Solved] = {}
        for name, solve in solvers.items():
            if all(row["solved"].get(name, {"is_proven": False})["is_proven"] for row in rows):
                solved[name] = solve(shop, limit_s)
        rows.append(_row(size, table, shop, solved, known_us, 0.1 if quick else 3.0))
    data = {"model": _MODEL, "limit_s": limit_s, "solvers": [*solvers], "sizes": rows}
    return Result(data=data, table=_markdown(data), picture=_picture(data))


def _table(num_microbatches: int) -> TaskTable:
    """One segment per module, microbatches whole, no memory limit: 16 tasks a microbatch."""
    problem = batch_of(_MODEL, 7, num_microbatches)
    free = (_UNLIMITED_BYTES,) * problem.num_ranks
    problem = problem.model_copy(update={"memory_limit_bytes": free})
    layers = {module.name: module.num_layers for module in problem.modules}
    partition: Partition = uniform_partition(layers, dict.fromkeys(layers, 1), problem.num_ranks)
    return table_of(problem, partition)


def _row(
    size: int,
    table: TaskTable,
    shop: JobShop,
    solved: dict[str, Solved],
    known_us: float,
    search_s: float,
) -> dict[str, Any]:
    """What is kept of one size; the planner's search gets ``search_s`` of processor time."""
    bound_us = lower_bound_us(table)
    evaluator = ClockedEvaluator(table, search_s, bound_us)
    SEARCHES["ours (local search)"](evaluator, 0)
    proven = [one.makespan_us for one in solved.values() if one.is_proven and one.makespan_us]
    found = [one.makespan_us for one in solved.values() if one.makespan_us]
    best_us = evaluator.progress[-1][1]
    # Solvers round times to microseconds.
    goal_us = (1 + 1e-4) * min(proven) if proven else (1 + _CLOSE) * min(known_us, best_us, *found)
    return {
        "microbatches": size,
        "pairs": len(shop.pairs),
        "bound_us": bound_us,
        "solved": {name: one._asdict() for name, one in solved.items()},
        "best_is_proven": bool(proven),
        "goal_us": goal_us,
        "search_s": next((at for at, us in evaluator.progress if us <= goal_us), None),
        "search_us": best_us,
    }


def _markdown(data: dict[str, Any]) -> str:
    def solver_cell(row: dict[str, Any], name: str) -> str:
        found = row["solved"].get(name)
        if found is None:
            return "-"
        if not found["is_proven"]:
            return f"not in {data['limit_s']:.0f} s"
        return f"{found['seconds']:.2f} s"

    return markdown(
        [
            "microbatches",
            "pairs to decide",
            *(f"{name}, proof" for name in data["solvers"]),
            "ours, to the same or within 1% of the best known",
            "ours over the bound",
        ],
        [
            [
                str(row["microbatches"]),
                f"{row['pairs']:,}",
                *(solver_cell(row, name) for name in data["solvers"]),
                "not reached" if row["search_s"] is None else f"{row['search_s']:.3f} s",
                f"{row['search_us'] / row['bound_us'] - 1:.1%}",
            ]
            for row in data["sizes"]
        ],
    )


def _picture(data: dict[str, Any]) -> str:
    limit_s, rows = data["limit_s"], data["sizes"]
    series = [
        Series(
            f"{name}: proof",
            [
                (row["microbatches"], row["solved"][name]["seconds"])
                for row in rows
                if name in row["solved"] and row["solved"][name]["is_proven"]
            ],
        )
        for name in data["solvers"]
    ]
    failed = {
        row["microbatches"]
        for row in rows
        for solved in row["solved"].values()
        if not solved["is_proven"]
    }
    if failed:
        name = f"a solver did not end in {limit_s:.0f} s"
        series.append(Series(name, [(size, limit_s) for size in sorted(failed)], "marks", 4))
    reached = [(row["microbatches"], row["search_s"]) for row in rows if row["search_s"]]
    series.append(Series("ours: the same, or within 1% of the best known", reached, colour=2))
    published = [(_PUBLISHED_END, 0.001), (_PUBLISHED_END, 100.0)]
    series.append(Series("published: Z3 and Gurobi do not end beyond", published, "dotted line", 6))
    return draw_lines(
        "Time to an optimal order by the number of microbatches",
        Axis("microbatches", 1, 64, is_log=True, ticks=[1, 2, 4, 8, 16, 32, 64]),
        Axis("processor time of one core, s", 0.001, 100.0, is_log=True),
        series,
    )
