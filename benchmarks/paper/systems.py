"""The systems that the paper compares with, on batches that must keep the memory limit.

They are the baselines ``megatron`` (and ``megatron-4``), ``nnscaler`` and ``optimus-coarse``
(``docs/baselines.md``).  Megatron recomputes the fewest layers per piece that keep the limit,
nnScaler the fewest on every rank, anew for every batch.  Optimus, which bounds nothing, recomputes
the least share of the layers of every stage.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.planner.baselines import (
    FlatChain,
    StaticCuts,
    StaticSimulator,
    run_with_own_recomputation,
    run_within_memory,
)
from megatron_dip.planner.baselines.on_stages import order_optimus_coarse
from megatron_dip.simulator import TaskTable, simulate_order
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.simulator.simulate import Simulation
from megatron_dip.workload import Problem

from .setting import table_of

__all__ = [
    "MEGATRON",
    "MEGATRON_4",
    "NNSCALER",
    "OPTIMUS",
    "Ran",
    "Systems",
    "fastest_within_memory",
    "ran",
]

MEGATRON, OPTIMUS, NNSCALER = "Megatron", "Optimus", "nnScaler"
MEGATRON_4 = "Megatron, 4 chunks"
_SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of the layers of every stage that are recomputed."""


class Ran(NamedTuple):
    """One schedule of one batch."""

    makespan_us: float
    peak_bytes: tuple[int, ...]
    """Per rank, weights included."""
    memory: list[tuple[float, int]]
    """Rank 0: microseconds, and the bytes held from then on."""


class Systems:
    """The systems on one model, fitted to ``samples``."""

    def __init__(self, samples: Sequence[Problem], partition: Partition) -> None:
        self._partition = partition
        self._cuts = StaticCuts(samples)

    def run(self, name: str, problem: Problem) -> Ran:
        """One of them on one batch.

        Raises:
            InfeasibleError: It cannot keep the memory limit.
        """
        if name == OPTIMUS:
            table = table_of(problem, self._partition)
            return ran(fastest_within_memory(table, order_optimus_coarse))
        simulator = StaticSimulator(FlatChain(problem))
        if name == NNSCALER:
            found = run_with_own_recomputation(simulator, self._cuts.nnscaler)
        else:
            cuts = {MEGATRON: self._cuts.megatron, MEGATRON_4: self._cuts.megatron_in_four}
            found = run_within_memory(simulator, cuts[name])
        memory = found.panel("").memory
        assert memory is not None, "static schedules know their memory"
        return Ran(found.makespan_us, found.peak_bytes, list(memory[0]))

    def megatron_without_limit_us(self, problem: Problem) -> float:
        """What Megatron's schedule takes if it may hold whatever it likes."""
        return StaticSimulator(FlatChain(problem)).makespan_us(self._cuts.megatron)


def fastest_within_memory(table: TaskTable, order: Callable[[TaskTable], TaskOrder]) -> Simulation:
    """An order with the share of recomputed layers, one for all stages, that makes it fastest.

    Raises:
        InfeasibleError: It keeps the memory limit with none.
    """
    limits = table.graph.problem.memory_limit_bytes
    best: Simulation | None = None
    for share in _SHARES:
        limited = table.with_recompute(np.ceil(share * table.num_layers).astype(np.int64))
        try:
            found = simulate_order(limited, order(limited))
        except InfeasibleError:
            continue
        fits = all(peak <= limit for peak, limit in zip(found.peak_bytes, limits, strict=True))
        if fits and (best is None or found.makespan_us < best.makespan_us):
            best = found
    if best is None:
        raise InfeasibleError("more than the memory limit with every layer recomputed")
    return best


def ran(simulation: Simulation) -> Ran:
    """What is kept of a simulation with whole backwards."""
    table, order = simulation.table, simulation.order
    held = int(table.static_bytes[0])
    memory = [(0.0, held)]
    for task in order.task[: order.first[1]].tolist():
        kind, work = divmod(task, table.num_works)
        if kind == 0:
            held += int(table.stored_bytes[work])
            memory.append((float(simulation.starts_us[task]), held))
        else:
            held -= int(table.stored_bytes[work])
            memory.append((float(simulation.ends_us[task]), held))
    return Ran(simulation.makespan_us, simulation.peak_bytes, memory)
