"""The order of a batch as a model for exact solvers: a job shop with delays.

Every task has a start; a task waits for its inputs and their transfers; of two tasks of one rank
one goes first.  Memory is left out, which makes it easier, and a known makespan bounds all starts.
HiGHS gets a mixed integer program with a binary per pair of tasks of one rank between which nothing
decides; CP-SAT (OR-tools, where it is installed) one no-overlap constraint per rank.
"""

import importlib
import importlib.util
import itertools
import time
from typing import NamedTuple

import highspy
import numpy as np

from megatron_dip.simulator.bounds import heads_us, tails_us
from megatron_dip.simulator.tasks import TaskTable

__all__ = ["JobShop", "Solved", "has_cp_sat", "solve_cp_sat", "solve_highs"]


class Solved(NamedTuple):
    """What a solver found within its time."""

    seconds: float
    """Processor time."""
    is_proven: bool
    makespan_us: float | None
    """Of the best order found."""


class JobShop(NamedTuple):
    """Tasks of a batch with whole backwards; times are whole numbers, as CP-SAT wants them."""

    rank: list[int]
    """Per task, as the next three."""
    duration_us: list[int]
    earliest_us: list[int]
    latest_us: list[int]
    """Start, if the batch is to end within the known makespan."""
    edges: list[tuple[int, int, int]]
    """(task, task that waits for its end, delay)"""
    pairs: list[tuple[int, int]]
    """Tasks of one rank between which nothing decides."""
    least_us: int
    """No order ends earlier."""
    most_us: int
    """The known makespan."""

    @classmethod
    def of(cls, table: TaskTable, least_us: float, known_us: float) -> "JobShop":
        """The batch of ``table``, for which an order of ``known_us`` is known."""
        graph = table.whole
        tasks = np.flatnonzero(graph.exists)
        place = np.full(len(graph.exists), -1)
        place[tasks] = np.arange(len(tasks))
        before = np.repeat(np.arange(len(graph.exists)), np.diff(graph.first_output))
        edges = [
            (int(place[a]), int(place[b]), round(delay))
            for a, b, delay in zip(
                before.tolist(), graph.output.tolist(), graph.delay_us.tolist(), strict=True
            )
        ]
        # Rounding may add a microsecond per task and per transfer.
        most_us = int(known_us) + 2 * len(tasks)
        rank = np.tile(graph.rank, 3)[tasks].tolist()
        follows = _followers(len(tasks), edges)
        return cls(
            rank=rank,
            duration_us=[round(time_us) for time_us in graph.duration_us[tasks].tolist()],
            earliest_us=np.maximum(heads_us(graph)[tasks] - len(tasks), 0).astype(int).tolist(),
            latest_us=(most_us - tails_us(graph)[tasks] + len(tasks)).astype(int).tolist(),
            edges=edges,
            pairs=[
                (a, b)
                for a, b in itertools.combinations(range(len(tasks)), 2)
                if rank[a] == rank[b] and not (follows[a] >> b & 1 or follows[b] >> a & 1)
            ],
            least_us=max(0, int(least_us) - 2 * len(tasks)),
            most_us=most_us,
        )


class _SilentHighs(highspy.Highs):
    """Silent from the start: enabling callbacks, which the constructor does, prints a banner."""

    def enableCallbacks(self) -> None:
        self.silent()
        super().enableCallbacks()


def solve_highs(shop: JobShop, limit_s: float) -> Solved:
    """As a mixed integer program, in milliseconds."""
    started = time.process_time()
    solver = _SilentHighs()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", limit_s)
    begins = [
        solver.addVariable(lb=low / 1000, ub=high / 1000)
        for low, high in zip(shop.earliest_us, shop.latest_us, strict=True)
    ]
    end = solver.addVariable(lb=shop.least_us / 1000, ub=shop.most_us / 1000)
    length = [time_us / 1000 for time_us in shop.duration_us]
    for a, b, delay_us in shop.edges:
        solver.addConstr(begins[b] - begins[a] >= length[a] + delay_us / 1000)
    for a, begin in enumerate(begins):
        solver.addConstr(end - begin >= length[a])
    for a, b in shop.pairs:
        a_first = solver.addBinary()
        slack_b = (shop.latest_us[a] - shop.earliest_us[b]) / 1000 + length[a]
        slack_a = (shop.latest_us[b] - shop.earliest_us[a]) / 1000 + length[b]
        solver.addConstr(begins[b] - begins[a] - slack_b * a_first >= length[a] - slack_b)
        solver.addConstr(begins[a] - begins[b] + slack_a * a_first >= length[b])
    solver.minimize(end)
    info = solver.getInfo()
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    return Solved(
        seconds=time.process_time() - started,
        is_proven=solver.getModelStatus() == highspy.HighsModelStatus.kOptimal,
        makespan_us=1000 * info.objective_function_value if found else None,
    )


def has_cp_sat() -> bool:
    """Whether OR-tools is installed."""
    return importlib.util.find_spec("ortools") is not None


def solve_cp_sat(shop: JobShop, limit_s: float) -> Solved:
    """With OR-tools' constraint solver, one worker."""
    cp_model = importlib.import_module("ortools.sat.python.cp_model")
    started = time.process_time()
    model = cp_model.CpModel()
    begins = [
        model.new_int_var(low, high, f"start {task}")
        for task, (low, high) in enumerate(zip(shop.earliest_us, shop.latest_us, strict=True))
    ]
    end = model.new_int_var(shop.least_us, shop.most_us, "end")
    for a, b, delay_us in shop.edges:
        model.add(begins[b] >= begins[a] + shop.duration_us[a] + delay_us)
    for begin, length_us in zip(begins, shop.duration_us, strict=True):
        model.add(end >= begin + length_us)
    for rank in sorted(set(shop.rank)):
        model.add_no_overlap(
            [
                model.new_fixed_size_interval_var(begins[task], shop.duration_us[task], f"{task}")
                for task, other in enumerate(shop.rank)
                if other == rank
            ]
        )
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    return Solved(
        seconds=time.process_time() - started,
        is_proven=status == cp_model.OPTIMAL,
        makespan_us=solver.objective_value
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        else None,
    )


def _followers(num_tasks: int, edges: list[tuple[int, int, int]]) -> list[int]:
    """Per task, those that wait for it, directly or not, as a bit mask."""
    after: list[list[int]] = [[] for _ in range(num_tasks)]
    num_inputs = [0] * num_tasks
    for a, b, _ in edges:
        after[a].append(b)
        num_inputs[b] += 1
    ready = [task for task in range(num_tasks) if not num_inputs[task]]
    for task in ready:
        for other in after[task]:
            num_inputs[other] -= 1
            if not num_inputs[other]:
                ready.append(other)
    masks = [0] * num_tasks
    for task in reversed(ready):
        for other in after[task]:
            masks[task] |= masks[other] | 1 << other
    return masks
