"""Running a cut of the flat chain in the compiled simulator.

A *work* is one microbatch m in one piece v and has the number v x M + m; tasks are numbered as in
:mod:`megatron_dip.simulator.arrays`.  Every rank computes strictly in its order, but transfers
overlap with all computing and nobody waits for a send: generous to Megatron, whose ranks meet at
their transfers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.errors import InfeasibleError
from megatron_dip.planner.baselines.flat_chain import FlatChain, PieceCosts, StaticCut
from megatron_dip.planner.baselines.megatron_orders import interleaved_order, one_f_one_b_order
from megatron_dip.simulator.arrays import (
    BACKWARD_KIND,
    FORWARD_KIND,
    WEIGHT_KIND,
    FloatArray,
    TaskGraph,
    TaskOrder,
    task_graph,
    timed,
)
from megatron_dip.simulator.kernels import Stored, new_run_state, peak_bytes, run_order
from megatron_dip.simulator.timeline import Panel, Span, SpanKind

__all__ = [
    "StaticRun",
    "StaticSimulator",
    "finish_run",
    "make_graph",
    "run_with_own_recomputation",
    "run_within_memory",
]

_SPLIT_KINDS: tuple[SpanKind, ...] = ("F", "I", "W")


@dataclass(frozen=True, kw_only=True)
class StaticRun:
    """A schedule of a cut, simulated."""

    chain: FlatChain
    cut: StaticCut
    num_recomputed: int | tuple[int, ...]
    """Layers in every piece, or in each one."""
    costs: PieceCosts
    order: TaskOrder
    starts_us: FloatArray
    """[3 N]"""
    ends_us: FloatArray
    peak_bytes: tuple[int, ...]
    """Per rank, weights included."""

    @cached_property
    def makespan_us(self) -> float:
        return float(self.ends_us.max(initial=0.0))

    @cached_property
    def busy_us(self) -> tuple[float, ...]:
        """Per rank."""
        lengths = self.ends_us - self.starts_us
        return tuple(float(lengths[tasks].sum()) for tasks in self._lines())

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank, the part of the makespan without computing; zero if that is zero."""
        makespan_us = self.makespan_us
        return tuple(1.0 - busy / makespan_us if makespan_us else 0.0 for busy in self.busy_us)

    @property
    def keeps_memory_limit(self) -> bool:
        return self.chain.problem.keeps_memory_limit(self.peak_bytes)

    def panel(self, title: str) -> Panel:
        """The schedule as a timeline; a task of several modules is a bar for each of them."""
        return Panel(
            title=title,
            spans=[
                span
                for rank, tasks in enumerate(self._lines())
                for span in self._spans(rank, tasks)
            ],
            num_ranks=self.cut.num_ranks,
            memory={rank: self._curve(rank, tasks) for rank, tasks in enumerate(self._lines())},
        )

    def _lines(self) -> list[NDArray[np.int64]]:
        return np.split(self.order.task, self.order.first[1:-1])

    @cached_property
    def _has_weight_task(self) -> NDArray[np.bool_]:
        found = np.zeros(len(self.starts_us), dtype=bool)
        found[self.order.task] = True
        return found[2 * len(found) // 3 :]

    def _spans(self, rank: int, tasks: NDArray[np.int64]) -> Iterator[Span]:
        names = self.chain.problem.module_order
        num_microbatches = self.chain.problem.num_microbatches
        num_works = len(self.starts_us) // 3
        for task in tasks.tolist():
            kind, work = divmod(task, num_works)
            piece, number = divmod(work, num_microbatches)
            is_split = bool(self._has_weight_task[work])
            parts = list(zip(names, self.costs.parts, strict=True))
            start_us = float(self.starts_us[task])
            for name, part in parts if kind == FORWARD_KIND else parts[::-1]:
                times = (part.forward_us, part.input_grad_us, part.weight_grad_us)
                length_us = float(times[kind][piece, number])
                label = _SPLIT_KINDS[kind]
                weight_us = float(part.weight_grad_us[piece, number])
                if kind == BACKWARD_KIND and not is_split and weight_us:
                    length_us += weight_us
                    label = "B"
                if length_us:
                    text = f"{piece}{label}{number}"
                    yield Span(rank, name, text, start_us, start_us + length_us, label)
                    start_us += length_us

    def _curve(self, rank: int, tasks: NDArray[np.int64]) -> list[tuple[float, int]]:
        stored = self.costs.total.stored_bytes.ravel().tolist()
        num_works = len(stored)
        held = int(self.costs.total.static_bytes[rank :: self.cut.num_ranks].sum())
        curve = [(0.0, held)]
        for task in tasks.tolist():
            kind, work = divmod(task, num_works)
            if kind == FORWARD_KIND:
                held += stored[work]
                curve.append((float(self.starts_us[task]), held))
            elif kind == WEIGHT_KIND or not self._has_weight_task[work]:
                held -= stored[work]
                curve.append((float(self.ends_us[task]), held))
        return curve


class _Schedule(NamedTuple):
    """What cuts with equally many pieces without a backward have in common."""

    graph: TaskGraph
    edge: NDArray[np.int64]
    """[E]: which entry of the delays belongs to every edge; the last one is zero."""
    order: TaskOrder

    def graph_with(
        self, forward_us: FloatArray, backward_us: FloatArray, delay_us: FloatArray
    ) -> TaskGraph:
        """The graph with times [Q, M] of the pieces and delays [Q - 1, M] between them."""
        forward, backward = forward_us.ravel(), backward_us.ravel()
        return self.graph._replace(
            duration_us=np.concatenate([forward, backward, np.zeros(len(forward))]),
            delay_us=np.append(delay_us.ravel(), 0.0)[self.edge],
        )


class StaticSimulator:
    """Megatron's 1F1B, or its interleaved schedule where there are several pieces per rank."""

    def __init__(self, chain: FlatChain) -> None:
        self.chain = chain
        self._schedules: dict[tuple[int, int, int], _Schedule] = {}

    def run(self, cut: StaticCut, num_recomputed: int | tuple[int, ...] = 0) -> StaticRun:
        """Simulate ``cut``.

        Raises:
            PartitionError: The cut has another number of layers than the chain.
            InfeasibleError: Megatron refuses the schedule: fewer microbatches than ranks.
        """
        costs = self.chain.costs(cut, num_recomputed)
        schedule = self._schedule(cut)
        total = costs.total
        backward_us = total.input_grad_us + total.weight_grad_us
        graph = schedule.graph_with(total.forward_us, backward_us, costs.delay_us)
        return finish_run(self.chain, cut, num_recomputed, costs, graph, schedule.order)

    def makespan_us(self, cut: StaticCut) -> float:
        """The time of ``cut``, but for rounding: quick, for searches over many cuts."""
        schedule = self._schedule(cut)
        chain = self.chain
        places = np.cumsum((0, *cut.num_layers))
        graph = schedule.graph_with(
            np.diff(chain.forward_until_us[places], axis=0),
            np.diff(chain.backward_until_us[places], axis=0),
            chain.delay_at_us[places[1:-1]] * (cut.num_ranks > 1),
        )
        state = new_run_state(graph, schedule.order)
        run_order(graph, graph.duration_us, np.zeros(len(graph.rank)), schedule.order, state)
        return float(state.ends_us.max(initial=0.0))

    def _schedule(self, cut: StaticCut) -> _Schedule:
        has_backward = self.chain.has_backward(cut)
        key = (cut.num_ranks, cut.num_virtual, sum(has_backward))
        if key not in self._schedules:
            num_microbatches = self.chain.problem.num_microbatches
            order = _megatron_order(cut, num_microbatches, has_backward)
            nothing = [False] * len(has_backward)
            graph, edge = _topology(cut, num_microbatches, has_backward, nothing)
            self._schedules[key] = _Schedule(graph, edge, order)
        return self._schedules[key]


def make_graph(chain: FlatChain, cut: StaticCut, costs: PieceCosts) -> TaskGraph:
    """The graph of ``cut`` with split backwards."""
    graph, edge = _topology(
        cut, chain.problem.num_microbatches, chain.has_backward(cut), chain.has_weight_grad(cut)
    )
    total = costs.total
    times = [part.ravel() for part in (total.forward_us, total.input_grad_us, total.weight_grad_us)]
    delay_us = np.append(costs.delay_us.ravel(), 0.0)[edge]
    return timed(graph, np.concatenate(times))._replace(delay_us=delay_us)


def finish_run(
    chain: FlatChain,
    cut: StaticCut,
    num_recomputed: int | tuple[int, ...],
    costs: PieceCosts,
    graph: TaskGraph,
    order: TaskOrder,
) -> StaticRun:
    """Simulate ``order`` on ``graph``, time and memory."""
    state = new_run_state(graph, order)
    num_done, orphan = run_order(graph, graph.duration_us, np.zeros(len(graph.rank)), order, state)
    assert orphan < 0 and num_done == len(order.task), "static orders are complete and can run"
    num_works = len(graph.rank)
    is_last = graph.exists.copy()
    is_last[:num_works] = False
    is_last[num_works : 2 * num_works] &= ~is_last[2 * num_works :]
    peaks = costs.total.static_bytes.reshape(-1, cut.num_ranks).sum(axis=0)
    stored_bytes = costs.total.stored_bytes.ravel()
    stored = Stored(stored_bytes, np.zeros_like(stored_bytes), is_last)
    peak_bytes(stored, order, peaks, np.zeros_like(peaks))
    return StaticRun(
        chain=chain,
        cut=cut,
        num_recomputed=num_recomputed,
        costs=costs,
        order=order,
        starts_us=state.starts_us,
        ends_us=state.ends_us,
        peak_bytes=tuple(peaks.tolist()),
    )


def run_within_memory(simulator: StaticSimulator, cut: StaticCut) -> StaticRun:
    """``cut`` with the fewest recomputed layers, as many in every piece, that keep the limit.

    Raises:
        InfeasibleError: Recomputing every layer does not suffice; names rank, need and limit.
    """
    for num_recomputed in range(max(cut.num_layers) + 1):
        run = simulator.run(cut, num_recomputed)
        if run.keeps_memory_limit:
            return run
    raise _too_large(run)


def run_with_own_recomputation(simulator: StaticSimulator, cut: StaticCut) -> StaticRun:
    """``cut``, with one piece per rank, each with the fewest recomputed layers that keep its limit.

    What a rank holds depends on its own piece alone, since every order is fixed.

    Raises:
        InfeasibleError: See :func:`run_within_memory`.
    """
    assert cut.num_virtual == 1, "a rank has one piece to choose for"
    limits = simulator.chain.problem.memory_limit_bytes
    num_recomputed = [0] * cut.num_ranks
    run = simulator.run(cut, tuple(num_recomputed))
    while not run.keeps_memory_limit:
        for rank, most in enumerate(cut.num_layers):
            if run.peak_bytes[rank] > limits[rank]:
                num_recomputed[rank] += 1
                if num_recomputed[rank] > most:
                    raise _too_large(run)
        run = simulator.run(cut, tuple(num_recomputed))
    return run


def _too_large(run: StaticRun) -> InfeasibleError:
    limits = run.chain.problem.memory_limit_bytes
    rank = max(range(run.cut.num_ranks), key=lambda rank: run.peak_bytes[rank] - limits[rank])
    return InfeasibleError(
        f"rank {rank}: {run.peak_bytes[rank]} bytes with every layer recomputed (limit "
        f"{limits[rank]}: a static schedule cannot run this batch)"
    )


def _megatron_order(cut: StaticCut, num_microbatches: int, has_backward: list[bool]) -> TaskOrder:
    num_works = len(cut.num_layers) * num_microbatches
    tasks: list[int] = []
    first = [0]
    for rank in range(cut.num_ranks):
        if cut.num_virtual == 1:
            steps = one_f_one_b_order(cut.num_ranks, num_microbatches, rank)
        else:
            steps = interleaved_order(cut.num_ranks, cut.num_virtual, num_microbatches, rank)
        for step in steps:
            piece = step.chunk * cut.num_ranks + rank
            if has_backward[piece] or not step.is_backward:
                work = piece * num_microbatches + step.microbatch
                tasks.append(work + num_works * step.is_backward)
        first.append(len(tasks))
    return TaskOrder(np.array(tasks, dtype=np.int64), np.array(first, dtype=np.int64))


def _topology(
    cut: StaticCut, num_microbatches: int, has_backward: list[bool], has_weight_task: list[bool]
) -> tuple[TaskGraph, NDArray[np.int64]]:
    num_pieces = len(cut.num_layers)
    works = np.arange(num_pieces * num_microbatches)
    num_edges = (num_pieces - 1) * num_microbatches
    exists = np.concatenate([[True] * num_pieces, has_backward, has_weight_task])
    # Delays are filled in later: here, they are the numbers of the edges counted from 1.
    numbers = np.arange(1, num_edges + 1, dtype=np.float64)
    graph = task_graph(
        works // num_microbatches % cut.num_ranks,
        np.repeat(exists, num_microbatches),
        (works[:num_edges], works[:num_edges] + num_microbatches, numbers),
    )
    return graph, graph.delay_us.astype(np.int64) - 1
