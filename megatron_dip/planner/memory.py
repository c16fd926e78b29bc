"""Which layers to recompute and to offload, so that an order keeps the memory limit of every rank.

A work holds its activations from the start of its forward to the end of its backward; each of its
layers that is recomputed takes bytes off and adds time to its backward.  The layers of a stage cost
the same, so that a choice is a count per work.  Given an order, the ranks are independent of each
other, and a rank's choice is a covering problem: at every forward, what is recomputed of the works
held then must take off what is over the limit, at least cost.  Here is the heuristic, which takes
less time than making an order; :mod:`megatron_dip.planner.memory_program` solves it exactly.

With a link to the host, layers are lent to it before, see
:mod:`megatron_dip.planner.offload_kernels`: copies go beside computing.  What is over the limit
then is recomputed.

What recomputation costs depends on where it stands: nothing where the schedule has slack.
*Weights* say so: from 0 for a work whose backward could end later by all that recomputing would
add, to 1 for one on a critical path.
"""

from typing import NamedTuple

import numpy as np

from megatron_dip.plan.numbers import OFFLOAD_KIND
from megatron_dip.plan.plan import Offload, Recompute
from megatron_dip.planner.memory_kernels import (
    Savings,
    cover,
    latest_ends,
    new_cover_state,
    uncover,
)
from megatron_dip.planner.offload_kernels import Lending, Loans, lend, new_loans
from megatron_dip.simulator.arrays import FloatArray, IntArray, TaskGraph, TaskOrder
from megatron_dip.simulator.kernels import RunState, new_run_state, run_order
from megatron_dip.simulator.tasks import TaskTable
from megatron_dip.workload import HostLink

__all__ = ["Fit", "MemoryFitter", "RunTimes", "layers_to_offload", "layers_to_recompute"]

# Parts of all layers; between them the best is where holding back and recomputing meet.
_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
# Of a layer that costs nothing to recompute, so that no more is recomputed than must be.
_LEAST_WEIGHT = 0.05


class RunTimes(NamedTuple):
    """When the tasks of an order run."""

    starts_us: FloatArray
    """[3 N]"""
    makespan_us: float


class Fit(NamedTuple):
    """What makes an order keep the limits."""

    num_recomputed: IntArray
    """[N] layers."""
    num_offloaded: IntArray
    """[N] layers."""
    order: TaskOrder
    """With the copies."""
    times: RunTimes


class MemoryFitter:
    """Recomputation for orders of one batch, whose works start with nothing recomputed.

    Args:
        table: The batch, nothing recomputed.
        split_backward: Whether orders have input and weight gradients apart.
        one_queue: Whether they are for ranks with one hardware queue.
    """

    def __init__(self, table: TaskTable, *, split_backward: bool, one_queue: bool = False) -> None:
        self._table = table
        self._split_backward = split_backward
        self.graph = table.split if split_backward else table.whole
        self.recompute_layer_us = table.recompute_layer_us
        exists, num_works = self.graph.exists, table.num_works
        is_last = exists.copy()
        is_last[:num_works] = False
        is_last[num_works : 2 * num_works] &= ~exists[2 * num_works :]
        limits = np.array(table.graph.problem.memory_limit_bytes, dtype=np.int64)
        self.savings = Savings(
            stored_bytes=table.stored_bytes,
            layer_bytes=table.saved_layer_bytes,
            num_layers=np.where(table.saved_layer_bytes > 0, table.num_layers, 0),
            is_last=is_last,
            free_bytes=limits - table.static_bytes,
        )
        self._lending = self._lending_over(table.graph.problem.host_link, one_queue)

    def _lending_over(self, link: HostLink | None, one_queue: bool) -> Lending | None:
        """None where there is no link."""
        if link is None:
            return None
        costs = self._table.costs
        return Lending(
            stored_bytes=self.savings.stored_bytes,
            layer_bytes=costs.layer_bytes,
            num_layers=np.where(costs.layer_bytes > 0, self._table.num_layers, 0),
            is_last=self.savings.is_last,
            free_bytes=self.savings.free_bytes,
            host_bytes=np.array(link.memory_bytes, dtype=np.int64),
            latency_us=link.latency_us,
            bytes_per_us=link.bytes_per_us,
            is_aligned=one_queue,
        )

    @property
    def fits_at_once(self) -> bool:
        """Whether every rank has room for all works of the batch together."""
        held = np.zeros(len(self.savings.free_bytes), dtype=np.int64)
        np.add.at(held, self.graph.rank, self.savings.stored_bytes)
        return bool((held <= self.savings.free_bytes).all())

    def least_bytes(self, can_recompute: bool) -> IntArray:
        """Per rank, its weights and the microbatch that holds most, by itself."""
        savings, table = self.savings, self._table
        held = savings.stored_bytes
        if can_recompute:
            held = held - savings.num_layers * savings.layer_bytes
        needs = np.zeros((table.num_ranks, table.graph.problem.num_microbatches), dtype=np.int64)
        np.add.at(needs, (table.rank, table.microbatch), held)
        return table.static_bytes + needs.max(axis=1, initial=0)

    def durations_us(self, num_recomputed: IntArray) -> FloatArray:
        """[3 N]: times of all tasks, those of backwards with what they recompute."""
        num_works, costs = len(num_recomputed), self._table.costs
        backward_us = costs.input_grad_with(num_recomputed)
        if not self._split_backward:
            backward_us += costs.weight_grad_us
        duration_us = self.graph.duration_us.copy()
        duration_us[num_works : 2 * num_works] = backward_us
        return duration_us

    def fit(
        self,
        order: TaskOrder,
        weights: FloatArray | None = None,
        start: IntArray | None = None,
        loans: Loans | None = None,
    ) -> IntArray | None:
        """Layers to recompute of every work, [N]; None where not even all of them suffice.

        Args:
            order: The tasks of every rank.
            weights: [N] what a microsecond of recomputation counts; the same where it is None.
            start: [N] layers that are recomputed to begin with; none where it is None.
            loans: What the host holds for a while; nothing where it is None.
        """
        per_byte, savings = self._cost_per_byte(weights), self.savings
        state = new_cover_state(len(per_byte), len(order.task))
        if start is not None:
            state.num_recomputed[:] = start
        if loans is not None:
            lent = np.flatnonzero(loans.num_layers)
            lent_bytes = (loans.num_layers * self._table.costs.layer_bytes)[lent]
            np.subtract.at(state.change_bytes, loans.free[lent], lent_bytes)
            np.add.at(state.change_bytes, loans.back[lent], lent_bytes)
            most = self._table.num_layers - loans.num_layers
            savings = savings._replace(num_layers=np.minimum(savings.num_layers, most))
        if not cover(order, savings, per_byte, state):
            return None
        recomputed = np.flatnonzero(state.num_recomputed)
        if len(recomputed):
            dearest = recomputed[np.argsort(-per_byte[recomputed], kind="stable")]
            uncover(order, savings, self.graph.rank, dearest, state)
        return state.num_recomputed

    def _cost_per_byte(self, weights: FloatArray | None) -> FloatArray:
        """[N] of recomputing."""
        cost = self.recompute_layer_us if weights is None else self.recompute_layer_us * weights
        return cost / np.maximum(self.savings.layer_bytes, 1)

    def fit_and_run(
        self, order: TaskOrder, starts_us: FloatArray, weights: FloatArray | None = None
    ) -> Fit | None:
        """Offload what the link can take and recompute the rest; None where that does not suffice.

        Args:
            order: The tasks of every rank.
            starts_us: [3 N] when tasks would start if everything fitted.
            weights: [N] what a microsecond of recomputation counts; the same where it is None.
        """
        chosen, loans = None, None
        if self._lending is not None:
            loans = new_loans(len(self.graph.rank), len(order.task))
            per_byte = np.where(self.savings.num_layers > 0, self._cost_per_byte(weights), np.inf)
            lend(order, self._lending, (starts_us, self.graph.duration_us), per_byte, loans)
            chosen = self.fit(order, weights, loans=loans)
        if chosen is None:
            # Layers that are back when memory is short cannot be recomputed any more.
            chosen, loans = self.fit(order, weights), None
        if chosen is None:
            return None
        num_offloaded = np.zeros_like(chosen) if loans is None else loans.num_layers
        full = order if loans is None else _with_copies(order, loans)
        return Fit(chosen, num_offloaded, full, self.run(full, chosen, num_offloaded))

    def run(
        self,
        order: TaskOrder,
        num_recomputed: IntArray,
        num_offloaded: IntArray | None = None,
    ) -> RunTimes:
        """Run an order that is complete and correct."""
        state, _ = self._run(self._timed_graph(num_recomputed), order, num_offloaded)
        return RunTimes(state.starts_us, float(state.ends_us.max(initial=0.0)))

    def slack_us(self, order: TaskOrder, num_recomputed: IntArray) -> FloatArray:
        """[3 N]: by how much later every task could end so that the order ends at the same time."""
        graph = self._timed_graph(num_recomputed)
        state, num_done = self._run(graph, order)
        latest_us = np.empty(len(graph.exists))
        latest_ends(graph, state, num_done, float(state.ends_us.max(initial=0.0)), latest_us)
        return latest_us - state.ends_us

    def weights(self, slack_us: FloatArray) -> FloatArray:
        """[N]: what recomputation counts where tasks have this slack, see the top of the file."""
        num_works = len(self.graph.rank)
        whole_us = self.recompute_layer_us * np.maximum(self.savings.num_layers, 1)
        slack = slack_us[num_works : 2 * num_works] / np.maximum(whole_us, 1e-9)
        return np.clip(1.0 - slack, _LEAST_WEIGHT, 1.0)

    def _timed_graph(self, num_recomputed: IntArray) -> TaskGraph:
        return self.graph._replace(duration_us=self.durations_us(num_recomputed))

    def _run(
        self, graph: TaskGraph, order: TaskOrder, num_offloaded: IntArray | None = None
    ) -> tuple[RunState, int]:
        copy_us = self._table.copy_us
        if num_offloaded is not None and self._lending is not None:
            num_bytes = num_offloaded * self._lending.layer_bytes
            copy_us = self._lending.latency_us + num_bytes / self._lending.bytes_per_us
        state = new_run_state(graph, order)
        num_done, _ = run_order(graph, graph.duration_us, copy_us, order, state)
        return state, num_done


def _with_copies(order: TaskOrder, loans: Loans) -> TaskOrder:
    """Copies among the tasks: at one place first those to the host, then releases, then back."""
    lent = np.flatnonzero(loans.num_layers)
    places = np.concatenate([loans.out[lent], loans.free[lent], loans.back[lent]])
    times_us = np.concatenate([loans.out_us[lent], np.zeros(len(lent)), loans.back_us[lent]])
    kind = np.repeat(OFFLOAD_KIND + np.arange(3), len(lent))
    by_place = np.lexsort((times_us, kind, places))
    copies = (kind * len(loans.num_layers) + np.tile(lent, 3))[by_place]
    places = places[by_place]
    return TaskOrder(
        np.insert(order.task, places, copies),
        order.first + np.searchsorted(places, order.first),
    )


def layers_to_recompute(table: TaskTable, num_recomputed: IntArray) -> tuple[Recompute, ...]:
    """The choice as a plan has it: of each stage, the first layers with a backward."""
    entries = []
    for number in np.flatnonzero(num_recomputed).tolist():
        work = table.graph.works[number]
        layers = table.graph.backwards[work.stage].layers[: num_recomputed[number]]
        entries.append(Recompute(work.stage, work.microbatch, work.sub, tuple(layers)))
    return tuple(entries)


def layers_to_offload(table: TaskTable, num_offloaded: IntArray) -> tuple[Offload, ...]:
    """The choice as a plan has it: of each stage, the last layers."""
    entries = []
    for number in np.flatnonzero(num_offloaded).tolist():
        work = table.graph.works[number]
        layers = table.graph.backwards[work.stage].layers[-num_offloaded[number] :]
        entries.append(Offload(work.stage, work.microbatch, work.sub, tuple(layers)))
    return tuple(entries)


def memory_levels(savings: Savings, rank: IntArray, microbatch: IntArray) -> tuple[IntArray, ...]:
    """What works are taken to hold when a schedule is made, [N] each, the most first.

    The first is what they hold with nothing recomputed, then less and less.  The less, the more
    works a schedule has under way at once, and the more must be recomputed in its order afterwards.
    Levels at which a microbatch does not fit alone are left out, except for the last of all, and
    so are those that admit no more than the one before.
    """
    levels: list[IntArray] = []
    for part in _LEVELS:
        saved_bytes = np.floor(savings.num_layers * part * savings.layer_bytes)
        stored_bytes = savings.stored_bytes - saved_bytes.astype(np.int64)
        needs = np.zeros((len(savings.free_bytes), int(microbatch.max(initial=0)) + 1), np.int64)
        np.add.at(needs, (rank, microbatch), stored_bytes)
        if part == _LEVELS[-1] or (needs <= savings.free_bytes[:, None]).all():
            levels.append(stored_bytes)
        if (needs.sum(axis=1) <= savings.free_bytes).all():
            break
    return tuple(levels)
