"""The systems that the paper compares with, as its text defines them.

- *Megatron*: interleaved 1F1B, pieces balanced by **parameters**; of the numbers of pieces per rank
  the one that is best on the fit batches.
- *nnScaler*: one piece per rank, the best cut for the fit batches.
- *Optimus*: encoders, cut over all ranks, fill the gaps of Megatron's order of the backbone.  The
  paper has its coarse variant only, which fills less.

Megatron and nnScaler recompute the fewest layers per piece that keep the memory limit, anew for
every batch; Optimus the least share of the layers of every stage.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_dip.costs.shapes import ModelShape
from megatron_dip.errors import InfeasibleError
from megatron_dip.partition import Partition
from megatron_dip.planner.baselines import (
    FlatChain,
    StaticCut,
    StaticCuts,
    StaticSimulator,
    run_within_memory,
)
from megatron_dip.planner.baselines.cuts import balanced_layers
from megatron_dip.planner.baselines.on_stages import order_encoder_in_bubbles
from megatron_dip.simulator import TaskTable, simulate_order
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.simulator.simulate import Simulation
from megatron_dip.workload import Problem

from .setting import table_of

__all__ = ["MEGATRON", "NNSCALER", "OPTIMUS", "Ran", "Systems", "fastest_within_memory", "ran"]

MEGATRON, OPTIMUS, NNSCALER = "Megatron", "Optimus", "nnScaler"
_MOST_PIECES = 8
"""Of Megatron, per rank."""
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
    """The three on one model, fitted to ``samples``."""

    def __init__(self, shape: ModelShape, samples: Sequence[Problem], partition: Partition) -> None:
        self._shape = shape
        self._samples = samples
        self._partition = partition
        self._cuts = StaticCuts(samples)

    def run(self, name: str, problem: Problem) -> Ran:
        """One of them on one batch.

        Raises:
            InfeasibleError: It cannot keep the memory limit.
        """
        if name == OPTIMUS:
            table = table_of(problem, self._partition)
            return ran(fastest_within_memory(table, order_encoder_in_bubbles))
        cut = self._by_parameters if name == MEGATRON else self._cuts.one_f_one_b
        found = run_within_memory(FlatChain(problem), cut)
        memory = found.panel("").memory
        assert memory is not None, "static schedules know their memory"
        return Ran(found.makespan_us, found.peak_bytes, list(memory[0]))

    def megatron_without_limit_us(self, problem: Problem) -> float:
        """What Megatron's schedule takes if it may hold whatever it likes."""
        return StaticSimulator(FlatChain(problem)).makespan_us(self._by_parameters)

    @cached_property
    def _by_parameters(self) -> StaticCut:
        num_ranks = self._samples[0].num_ranks
        modules = {module.name: module for module in self._shape.modules}
        parameters = np.concatenate(
            [
                np.full(modules[name].num_layers, float(modules[name].layer_linear_parameters()))
                for name in self._samples[0].module_order
            ]
        )
        simulators = [StaticSimulator(FlatChain(sample)) for sample in self._samples]
        cuts = [
            StaticCut(
                num_ranks=num_ranks, num_layers=balanced_layers(parameters, count * num_ranks)
            )
            for count in range(2, min(_MOST_PIECES, len(parameters) // num_ranks) + 1)
        ]
        return min(cuts, key=lambda cut: sum(one.makespan_us(cut) for one in simulators))


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
