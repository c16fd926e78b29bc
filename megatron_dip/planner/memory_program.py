"""The memory program: the best recomputation for an order, as an integer program (DIP, III c).

The order of every rank is given.  Sought are the layers to recompute of every work, r, and the
starts of all tasks, so that the batch ends as early as possible:

- a task starts after the task before it on its rank, and after all that it waits for, where a
  backward takes (time of a layer's recomputation) x r longer;
- at every forward that passes the limit of its rank, what is recomputed of the works held then
  takes off what is over it.

Ending early comes first, little recomputation second, so that time off the critical path costs
next to nothing.  Solved with HiGHS from a choice that is already known.  The relaxation, in which
parts of layers may be recomputed, is solved first and rounded up, which keeps the limit; larger
programs end there.
"""

import itertools
from typing import NamedTuple

import highspy
import numpy as np

from megatron_dip.planner.memory import MemoryFitter
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder

__all__ = ["num_program_rows", "solve_memory_program"]

# Of a microsecond of recomputation, against one of the makespan.
_RECOMPUTE_COST = 1e-4
# Programs with more rows end with their relaxation, unless the caller has all the time there is.
_MAX_INTEGER_ROWS = 500
# Sizes near one suit the solver's tolerances.
_BYTES = 2.0**26


class _Rows:
    """Constraints, each at least a bound: sums of coefficient times column."""

    def __init__(self) -> None:
        self.bounds: list[FloatArray] = []
        self.columns: list[IntArray] = []
        self.values: list[FloatArray] = []
        self.lengths: list[IntArray] = []

    def add(
        self, bounds: FloatArray, columns: IntArray, values: FloatArray, lengths: IntArray
    ) -> None:
        self.bounds.append(bounds)
        self.columns.append(columns)
        self.values.append(values)
        self.lengths.append(lengths)


class _Program(NamedTuple):
    model: highspy.HighsLp
    works: IntArray
    """[K] works of which something may be recomputed: the last columns."""
    first_work_column: int
    unit_us: float
    """Of the columns that are times."""


def num_program_rows(fitter: MemoryFitter) -> int:
    """About how many constraints the program of an order has: what solving it takes grows with."""
    graph = fitter.graph
    return int(graph.exists.sum()) + len(_crossing_edges(graph)[0]) + len(graph.rank)


def _crossing_edges(graph: TaskGraph) -> tuple[IntArray, IntArray]:
    """Numbers of the edges between ranks, and the tasks where they start."""
    source = np.repeat(np.arange(len(graph.exists)), np.diff(graph.first_output))
    num_works = len(graph.rank)
    crosses = graph.rank[source % num_works] != graph.rank[graph.output % num_works]
    edges = np.flatnonzero(crosses)
    return edges, source[edges]


def solve_memory_program(
    fitter: MemoryFitter,
    order: TaskOrder,
    start: IntArray,
    *,
    limit_s: float | None = None,
    is_exact: bool = False,
) -> IntArray:
    """Layers to recompute of every work, [N]; never a later end than with ``start``.

    Args:
        fitter: The batch and its limits.
        order: The tasks of every rank.
        start: [N] a choice that keeps the limits.
        limit_s: When to stop; the result then depends on the machine.  Never where it is None.
        is_exact: Solve for whole layers to the end, whatever the size.
    """
    program = _build(fitter, order, fitter.run(order, start).makespan_us)
    candidates = [start]
    solver = _solver(limit_s)
    solver.passModel(program.model)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return start
    candidates.append(_rounded(fitter, order, program, solver))
    if is_exact or program.model.num_row_ <= _MAX_INTEGER_ROWS:
        solver = _solver(limit_s)
        kinds = [highspy.HighsVarType.kContinuous] * program.first_work_column
        kinds += [highspy.HighsVarType.kInteger] * len(program.works)
        program.model.integrality_ = kinds
        solver.passModel(program.model)
        best = min(candidates, key=lambda choice: fitter.run(order, choice).makespan_us)
        solver.setSolution(_solution(fitter, order, program, best))
        if not is_exact:
            solver.setOptionValue("mip_max_nodes", 100)
        solver.run()
        if (
            solver.getInfo().primal_solution_status
            == highspy.SolutionStatus.kSolutionStatusFeasible
        ):
            candidates.append(_rounded(fitter, order, program, solver))
    return min(candidates, key=lambda choice: fitter.run(order, choice).makespan_us)


class _SilentHighs(highspy.Highs):
    """Silent from the start: enabling callbacks, which the constructor does, prints a banner."""

    def enableCallbacks(self) -> None:
        self.silent()
        super().enableCallbacks()


def _solver(limit_s: float | None) -> highspy.Highs:
    solver = _SilentHighs()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_rel_gap", 0.0)
    if limit_s is not None:
        solver.setOptionValue("time_limit", limit_s)
    return solver


def _rounded(
    fitter: MemoryFitter, order: TaskOrder, program: _Program, solver: highspy.Highs
) -> IntArray:
    """Whole layers, no fewer than the solver's, without those that turn out to be too many."""
    parts = np.array(solver.getSolution().col_value)[program.first_work_column :]
    chosen = np.zeros(len(fitter.graph.rank), dtype=np.int64)
    chosen[program.works] = np.ceil(parts - 1e-6)
    # The tolerances of the solver may leave a few bytes over the limit.
    fitted = fitter.fit(order, start=chosen)
    assert fitted is not None, "an order has a solution that others of it start from"
    return fitted


def _solution(
    fitter: MemoryFitter, order: TaskOrder, program: _Program, chosen: IntArray
) -> highspy.HighsSolution:
    times = fitter.run(order, chosen)
    solution = highspy.HighsSolution()
    solution.col_value = [
        *(times.starts_us[order.task] / program.unit_us).tolist(),
        times.makespan_us / program.unit_us,
        *chosen[program.works].astype(float).tolist(),
    ]
    return solution


def _build(fitter: MemoryFitter, order: TaskOrder, makespan_us: float) -> _Program:
    """Columns: the start of every task of the order, the end of all, layers of every work."""
    unit_us = max(makespan_us / 1000.0, 1e-6)
    num_tasks = len(order.task)
    rows, works = _Rows(), np.flatnonzero(fitter.savings.num_layers)
    column = np.full(len(fitter.graph.rank), -1, dtype=np.int64)
    column[works] = num_tasks + 1 + np.arange(len(works))
    _add_times(fitter, order, column, unit_us, rows)
    for rank in range(len(order.first) - 1):
        _add_memory(fitter, order, rank, column, rows)
    model = highspy.HighsLp()
    model.num_col_ = num_tasks + 1 + len(works)
    cost = np.zeros(model.num_col_)
    cost[num_tasks] = 1.0
    cost[num_tasks + 1 :] = _RECOMPUTE_COST * fitter.recompute_layer_us[works] / unit_us
    model.col_cost_ = cost
    model.col_lower_ = np.zeros(model.num_col_)
    free = np.full(num_tasks + 1, highspy.kHighsInf)
    model.col_upper_ = np.concatenate([free, fitter.savings.num_layers[works]])
    model.row_lower_ = np.concatenate(rows.bounds)
    model.num_row_ = len(model.row_lower_)
    model.row_upper_ = np.full(model.num_row_, highspy.kHighsInf)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.concatenate(rows.lengths))])
    model.a_matrix_.index_ = np.concatenate(rows.columns)
    model.a_matrix_.value_ = np.concatenate(rows.values)
    return _Program(model, works, num_tasks + 1, unit_us)


def _add_times(
    fitter: MemoryFitter, order: TaskOrder, column: IntArray, unit_us: float, rows: _Rows
) -> None:
    """A task after the one before it and after all that it waits for, and the end after all."""
    graph = fitter.graph
    num_works, num_tasks = len(graph.rank), len(order.task)
    place = np.full(3 * num_works, -1, dtype=np.int64)
    place[order.task] = np.arange(num_tasks)
    is_last = np.zeros(num_tasks, dtype=bool)
    is_last[order.first[1:][order.first[1:] > order.first[:-1]] - 1] = True
    followed = np.flatnonzero(~is_last)
    edges, before = _crossing_edges(graph)
    source = np.concatenate([order.task, before])
    target = np.concatenate([np.full(num_tasks, num_tasks), place[graph.output[edges]]])
    target[followed] = followed + 1
    delay = np.concatenate([np.zeros(num_tasks), graph.delay_us[edges]])
    number = source % num_works
    recomputes = (source // num_works == 1) & (column[number] >= 0)
    lengths = 2 + recomputes.astype(np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)])
    columns, values = np.empty(first[-1], np.int64), np.empty(first[-1])
    columns[first[:-1]], values[first[:-1]] = target, 1.0
    columns[first[:-1] + 1], values[first[:-1] + 1] = place[source], -1.0
    columns[first[1:][recomputes] - 1] = column[number[recomputes]]
    layer_us = fitter.recompute_layer_us[number[recomputes]]
    values[first[1:][recomputes] - 1] = -layer_us / unit_us
    rows.add((graph.duration_us[source] + delay) / unit_us, columns, values, lengths)


def _add_memory(
    fitter: MemoryFitter, order: TaskOrder, rank: int, column: IntArray, rows: _Rows
) -> None:
    """At the last of forwards that follow one another: the most that is held at once."""
    savings = fitter.savings
    num_works = len(column)
    held = int(-savings.free_bytes[rank])
    live: dict[int, None] = {}
    line = order.task[order.first[rank] : order.first[rank + 1]].tolist()
    for task, after in itertools.pairwise([*line, num_works]):
        number = task % num_works
        if task < num_works:
            held += int(savings.stored_bytes[number])
            if column[number] >= 0:
                live[number] = None
            if held > 0 and after >= num_works:
                numbers = np.array(list(live), dtype=np.int64)
                rows.add(
                    np.array([held / _BYTES]),
                    column[numbers],
                    savings.layer_bytes[numbers] / _BYTES,
                    np.array([len(live)]),
                )
        elif savings.is_last[task]:
            held -= int(savings.stored_bytes[number])
            live.pop(number, None)
