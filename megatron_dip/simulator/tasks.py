"""One batch as flat tables: what simulator and planner compute on.

A work (one sub-microbatch in one stage) gets a number, its index in ``graph.works``.  Forward of a
work waits for the forwards of the works that feed it, each with the delay of the transfer between
them; backward waits for the backwards of the works that it feeds, with the same delays, because a
gradient message leaves when its last contributor ends.  The tables are made once per batch and are
not changed afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_dip.costs.work import static_bytes, work_costs
from megatron_dip.plan.graph import Message, PipelineGraph, Work
from megatron_dip.simulator.arrays import IntArray, TaskGraph, task_graph

__all__ = ["Edge", "MemoryArrays", "TaskTable", "build_task_table"]

Edge = tuple[int, float]
"""Number of the work at the other end, and microseconds between its end and this one's start."""


class MemoryArrays(NamedTuple):
    """What is held, in bytes; N works."""

    stored_bytes: IntArray
    """[N]"""
    static_bytes: IntArray
    """[num_ranks]"""


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """All works of a batch; every list is indexed by the number of the work."""

    graph: PipelineGraph
    works: tuple[Work, ...]
    numbers: Mapping[Work, int]
    rank: list[int]
    has_backward: list[bool]
    has_weight_grad: list[bool]
    forward_us: list[float]
    input_grad_us: list[float]
    """Recomputed layers included."""
    weight_grad_us: list[float]
    stored_bytes: list[int]
    """Held from the start of the forward to the end of the backward; zero without one."""
    feeds_from: list[list[Edge]]
    """Works whose forward this one's forward waits for."""
    feeds_to: list[list[Edge]]
    """Works whose forward waits for this one's."""
    gradients_from: list[list[Edge]]
    """Works whose backward this one's backward waits for."""
    gradients_to: list[list[Edge]]
    """Works whose backward waits for this one's."""
    static_bytes: tuple[int, ...]
    """Per rank."""

    @property
    def num_ranks(self) -> int:
        return self.graph.problem.num_ranks

    def backward_us(self, number: int) -> float:
        """Time of the whole backward."""
        return self.input_grad_us[number] + self.weight_grad_us[number]

    @cached_property
    def whole(self) -> TaskGraph:
        """The flat form in which every backward is one task."""
        return self._task_graph(is_split=False)

    @cached_property
    def split(self) -> TaskGraph:
        """The flat form in which every backward with weight gradients is two tasks."""
        return self._task_graph(is_split=True)

    @cached_property
    def memory(self) -> MemoryArrays:
        """The flat form of what every work and rank holds."""
        return MemoryArrays(
            stored_bytes=np.array(self.stored_bytes, dtype=np.int64),
            static_bytes=np.array(self.static_bytes, dtype=np.int64),
        )

    def _task_graph(self, is_split: bool) -> TaskGraph:
        edges = [(n, m, delay) for n, feeds in enumerate(self.feeds_to) for m, delay in feeds]
        has_weight_task = np.array(self.has_weight_grad) & is_split
        input_grad_us, weight_grad_us = np.array(self.input_grad_us), np.array(self.weight_grad_us)
        backward_us = np.where(has_weight_task, input_grad_us, input_grad_us + weight_grad_us)
        return task_graph(
            np.array(self.rank, dtype=np.int64),
            np.concatenate([self.forward_us, backward_us, weight_grad_us]),
            np.concatenate([np.ones(len(self.rank), bool), self.has_backward, has_weight_task]),
            (
                np.array([source for source, _, _ in edges], dtype=np.int64),
                np.array([target for _, target, _ in edges], dtype=np.int64),
                np.array([delay for _, _, delay in edges], dtype=np.float64),
            ),
        )


def build_task_table(
    graph: PipelineGraph, recomputed_layers: Mapping[Work, tuple[int, ...]] | None = None
) -> TaskTable:
    """The tables of ``graph``; ``recomputed_layers`` names the layers of a work to recompute."""
    recomputed_layers = recomputed_layers or {}
    works = graph.works
    numbers = {work: number for number, work in enumerate(works)}
    costs = work_costs(graph)
    input_grad_us: list[float] = []
    stored_bytes: list[int] = []
    for work in works:
        cost = costs[work]
        num_recomputed = len(recomputed_layers.get(work, ()))
        input_grad_us.append(cost.input_grad_us + num_recomputed * cost.recompute_layer_us)
        stored_bytes.append(cost.stored_bytes - num_recomputed * cost.saved_layer_bytes)
    has_backward = [graph.has_backward(work.stage) for work in works]
    feeds_from: list[list[Edge]] = [[] for _ in works]
    feeds_to: list[list[Edge]] = [[] for _ in works]
    gradients_from: list[list[Edge]] = [[] for _ in works]
    gradients_to: list[list[Edge]] = [[] for _ in works]
    delays: dict[tuple[int, int, int], float] = {}
    for number, work in enumerate(works):
        for message in graph.forward_inputs(work):
            source = numbers[Work(message.source, message.microbatch, message.sub)]
            delay = _delay_us(graph, message, delays)
            feeds_from[number].append((source, delay))
            feeds_to[source].append((number, delay))
            if has_backward[source]:
                gradients_from[source].append((number, delay))
                gradients_to[number].append((source, delay))
    problem, partition = graph.problem, graph.partition
    return TaskTable(
        graph=graph,
        works=works,
        numbers=numbers,
        rank=[partition[work.stage].rank for work in works],
        has_backward=has_backward,
        has_weight_grad=[graph.has_weight_grad(work.stage) for work in works],
        forward_us=[costs[work].forward_us for work in works],
        input_grad_us=input_grad_us,
        weight_grad_us=[costs[work].weight_grad_us for work in works],
        stored_bytes=stored_bytes,
        feeds_from=feeds_from,
        feeds_to=feeds_to,
        gradients_from=gradients_from,
        gradients_to=gradients_to,
        static_bytes=tuple(
            static_bytes(problem, partition, rank) for rank in range(problem.num_ranks)
        ),
    )


def _delay_us(
    graph: PipelineGraph, message: Message, delays: dict[tuple[int, int, int], float]
) -> float:
    if not graph.crosses_ranks(message):
        return 0.0
    key = (message.source, message.microbatch, message.sub)
    if key not in delays:
        delays[key] = graph.problem.transfer.time_us(graph.message_bytes(message))
    return delays[key]
