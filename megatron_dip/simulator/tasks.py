"""One batch as flat tables: what simulator and planner compute on.

A work (one sub-microbatch in one stage) gets a number, its index in ``graph.works``.  Forward of a
work waits for the forwards of the works that feed it, each with the delay of the transfer between
them; backward waits for the backwards of the works that it feeds, with the same delays, because a
gradient message leaves when its last contributor ends.  The tables are made once per batch and are
not changed afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_dip.costs.work import WorkCosts, static_bytes, work_costs
from megatron_dip.errors import PlanError
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.simulator.arrays import (
    BoolArray,
    FloatArray,
    IntArray,
    TaskGraph,
    task_graph,
    timed,
)

__all__ = ["TaskTable", "Topology", "build_task_table"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Who waits for whom, whatever the works take; E pairs of works."""

    graph: PipelineGraph
    source: IntArray
    """[E]: the work that is read; ascending."""
    target: IntArray
    """[E]: the work whose forward waits for the source's; backwards wait the other way round."""
    delay_us: FloatArray
    """[E]: between the end of the one and the start of the other, in both directions."""

    @cached_property
    def whole(self) -> TaskGraph:
        """The tasks, without their times, where every backward is one."""
        return self._task_graph(np.zeros_like(self.graph.wiring.has_weight_grad))

    @cached_property
    def split(self) -> TaskGraph:
        """The tasks, without their times, where every backward with weight gradients is two."""
        return self._task_graph(self.graph.wiring.has_weight_grad)

    def _task_graph(self, has_weight_task: BoolArray) -> TaskGraph:
        wiring = self.graph.wiring
        forwards = np.ones(len(wiring.rank), dtype=bool)
        exists = np.concatenate([forwards, wiring.has_backward, has_weight_task])
        return task_graph(wiring.rank, exists, (self.source, self.target, self.delay_us))


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """All works of a batch; every array is indexed by the number of the work, [N]."""

    graph: PipelineGraph
    topology: Topology
    costs: WorkCosts
    """Without recomputation."""
    num_layers: IntArray
    """Of the work's stage, those with a backward: what can be recomputed."""
    num_recomputed: IntArray
    """Layers that are computed again in the backward."""
    num_offloaded: IntArray
    """Layers whose activations are on the host for a while."""
    static_bytes: IntArray
    """[num_ranks]"""
    transfer_us: FloatArray
    """Of the work's output, or of its gradient, between two ranks."""

    def with_recompute(self, num_recomputed: IntArray) -> "TaskTable":
        """The same batch with ``num_recomputed`` ([N]) layers of every work recomputed."""
        return replace(self, num_recomputed=num_recomputed)

    def with_offload(self, num_offloaded: IntArray) -> "TaskTable":
        """The same batch with ``num_offloaded`` ([N]) layers of every work offloaded."""
        return replace(self, num_offloaded=num_offloaded)

    @property
    def num_ranks(self) -> int:
        return self.graph.problem.num_ranks

    @property
    def num_works(self) -> int:
        return len(self.num_layers)

    @property
    def rank(self) -> IntArray:
        return self.graph.wiring.rank

    @property
    def stage(self) -> IntArray:
        """Numbers of stages."""
        return self.graph.wiring.stage

    @property
    def microbatch(self) -> IntArray:
        return self.graph.wiring.microbatch

    @property
    def has_backward(self) -> BoolArray:
        return self.graph.wiring.has_backward

    @property
    def has_weight_grad(self) -> BoolArray:
        return self.graph.wiring.has_weight_grad

    @property
    def forward_us(self) -> FloatArray:
        return self.costs.forward_us

    @cached_property
    def input_grad_us(self) -> FloatArray:
        """Recomputed layers included."""
        return self.costs.input_grad_with(self.num_recomputed)

    @property
    def weight_grad_us(self) -> FloatArray:
        return self.costs.weight_grad_us

    @cached_property
    def backward_us(self) -> FloatArray:
        """Time of the whole backward."""
        return self.input_grad_us + self.weight_grad_us

    @cached_property
    def stored_bytes(self) -> IntArray:
        """Held from the start of the forward to the end of the backward; zero without one."""
        return self.costs.stored_bytes - self.num_recomputed * self.costs.saved_layer_bytes

    @cached_property
    def away_bytes(self) -> IntArray:
        """Of these, on the host for a while."""
        return self.num_offloaded * self.costs.layer_bytes

    @cached_property
    def copy_us(self) -> FloatArray:
        """Of what is offloaded, to the host or back."""
        is_away = self.num_offloaded > 0
        link = self.graph.problem.host_link
        if link is None:
            if is_away.any():
                raise PlanError("layers are offloaded but the problem has no host_link")
            return np.zeros(self.num_works)
        return np.where(is_away, link.latency_us + self.away_bytes / link.bytes_per_us, 0.0)

    @property
    def recompute_layer_us(self) -> FloatArray:
        """What each recomputed layer adds to the input gradient."""
        return self.costs.recompute_layer_us

    @property
    def saved_layer_bytes(self) -> IntArray:
        """What each recomputed layer takes off the stored bytes."""
        return self.costs.saved_layer_bytes

    @cached_property
    def whole(self) -> TaskGraph:
        """The flat form in which every backward is one task."""
        times_us = [self.forward_us, self.backward_us, self.weight_grad_us]
        return timed(self.topology.whole, np.concatenate(times_us))

    @cached_property
    def split(self) -> TaskGraph:
        """The flat form in which every backward with weight gradients is two tasks."""
        times_us = [self.forward_us, self.input_grad_us, self.weight_grad_us]
        return timed(self.topology.split, np.concatenate(times_us))


def build_task_table(
    graph: PipelineGraph,
    recomputed_layers: Mapping[Work, tuple[int, ...]] | None = None,
    offloaded_layers: Mapping[Work, tuple[int, ...]] | None = None,
) -> TaskTable:
    """The tables of ``graph``, with these layers of works recomputed and offloaded."""
    problem, partition, wiring = graph.problem, graph.partition, graph.wiring
    costs = work_costs(graph)
    source = wiring.reader_source
    crosses = wiring.rank[source] != wiring.rank[wiring.reader]
    transfer = problem.transfer
    transfer_us = transfer.latency_us + costs.boundary_bytes / transfer.bytes_per_us
    return TaskTable(
        graph=graph,
        topology=Topology(
            graph=graph,
            source=source,
            target=wiring.reader,
            delay_us=np.where(crosses, transfer_us[source], 0.0),
        ),
        costs=costs,
        num_layers=np.array(
            [len(graph.backwards[stage.stage].layers) for stage in graph.stages], dtype=np.int64
        )[wiring.place],
        num_recomputed=_num_layers(graph, recomputed_layers),
        num_offloaded=_num_layers(graph, offloaded_layers),
        static_bytes=np.array(
            [static_bytes(problem, partition, rank) for rank in range(problem.num_ranks)],
            dtype=np.int64,
        ),
        transfer_us=transfer_us,
    )


def _num_layers(graph: PipelineGraph, layers_of: Mapping[Work, tuple[int, ...]] | None) -> IntArray:
    """[N] how many layers are named for every work."""
    found = np.zeros(len(graph.wiring.stage), dtype=np.int64)
    for work, layers in (layers_of or {}).items():
        # A work that the batch does not have is for validation to refuse.
        if work in graph.numbers:
            found[graph.numbers[work]] = len(layers)
    return found
