"""The model as Megatron-LM sees it: one flat chain of layers, cut into contiguous pieces.

The layers of all modules follow one another in topological order (encoders, then the backbone).
Cut into ``num_virtual`` x ``num_ranks`` *pieces*, piece v sits on rank v modulo ``num_ranks``; a
piece may hold layers of several modules.  Every microbatch passes whole: there are no
sub-microbatches.

The cost of a layer is that of :mod:`megatron_dip.costs.work`; extras sit with the first and the
last layer of their module.  From a piece to the next one travels what later layers need: the output
of the layer before the cut, and that of every finished module whose readers are still to come.  A
microbatch without items of a module passes its layers without work and without bytes, so that its
transfers take the latency alone.

A piece has a backward if something in it or before it is trainable.  A module without a backward
of its own costs nothing in it: the gradient of an earlier module passes it by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PartitionError
from megatron_dip.simulator.arrays import FloatArray, IntArray
from megatron_dip.workload import Module, Problem

__all__ = ["FlatChain", "ModulePart", "PieceCosts", "StaticCut"]


@dataclass(frozen=True, kw_only=True)
class StaticCut:
    """How many layers of the flat chain every piece has, in the order of the chain.

    Raises:
        PartitionError: The ranks do not have equally many pieces, or one has less than no layers.
    """

    num_ranks: int
    num_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.num_layers or len(self.num_layers) % self.num_ranks or min(self.num_layers) < 0:
            raise PartitionError(
                f"static cut {list(self.num_layers)} for {self.num_ranks} ranks (expected equally "
                f"many pieces on every rank, and no piece with less than no layers)"
            )

    @property
    def num_virtual(self) -> int:
        """Pieces per rank: Megatron's virtual pipeline stages."""
        return len(self.num_layers) // self.num_ranks


class ModulePart(NamedTuple):
    """What one module costs in Q pieces, for M microbatches."""

    forward_us: FloatArray
    """[Q, M]"""
    input_grad_us: FloatArray
    """[Q, M], recomputed layers included."""
    weight_grad_us: FloatArray
    """[Q, M]"""
    stored_bytes: IntArray
    """[Q, M], from the start of the forward to the end of the backward."""
    static_bytes: IntArray
    """[Q]"""


class PieceCosts(NamedTuple):
    """What Q pieces cost, for M microbatches."""

    parts: tuple[ModulePart, ...]
    """Per module, in their order."""
    total: ModulePart
    delay_us: FloatArray
    """[Q - 1, M] from every piece to the next one, and back for the gradient."""


class _ModuleCosts(NamedTuple):
    """One module; arrays are [M] sums over the items of a microbatch, zero where it has none."""

    name: str
    start: int
    """Position of its first layer in the chain."""
    stop: int
    first_with_backward: int | None
    """As :meth:`megatron_dip.workload.Module.first_with_backward`, counted in the module."""
    module: Module
    layer_us: tuple[FloatArray, FloatArray, FloatArray]
    """Forward, input gradient and weight gradient of one layer."""
    first_us: tuple[FloatArray, FloatArray, FloatArray]
    """The same of what sits before the first layer."""
    last_us: tuple[FloatArray, FloatArray, FloatArray]
    recompute_us: FloatArray
    activation_bytes: IntArray
    boundary_bytes: IntArray
    first_bytes: IntArray
    """Kept by what sits before the first layer."""
    last_bytes: IntArray
    last_reader: int
    """Position of the first layer of the last module that reads this one; -1 without readers."""

    @property
    def backward_start(self) -> int:
        """Position of its first layer with a backward; ``stop`` where none has one."""
        first = self.first_with_backward
        return self.stop if first is None else self.start + max(first, 0)

    def trains(self, piece: range) -> bool:
        """Whether anything of the module in a run of positions, extras included, is trained."""
        first, last = max(piece.start, self.start), min(piece.stop, self.stop)
        if first >= last:
            return False
        form = self.module
        return bool(
            form.num_trained(range(first - self.start, last - self.start))
            or (first == self.start and form.trains_first_extra)
            or (last == self.stop and form.trains_last_extra)
        )


class FlatChain:
    """The flat chain of ``problem``, to be cut in any way."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        starts: dict[str, int] = {}
        self.num_layers = 0
        for name in problem.module_order:
            starts[name] = self.num_layers
            self.num_layers += problem.module(name).num_layers
        self._modules = tuple(_module_costs(problem, name, starts) for name in problem.module_order)
        trainable = [
            place
            for module in self._modules
            for place in range(module.start, module.stop)
            if module.trains(range(place, place + 1))
        ]
        self.first_trainable = min(trainable, default=self.num_layers)
        """Position of the first layer that has a weight gradient, in itself or in the extras that
        sit with it; ``num_layers`` if all is frozen."""

    @cached_property
    def forward_until_us(self) -> FloatArray:
        """[num_layers + 1, M]: time of the forwards of all layers before a position."""
        return _until(self._layers.forward_us)

    @cached_property
    def backward_until_us(self) -> FloatArray:
        """[num_layers + 1, M]: time of the whole backwards of all layers before a position."""
        return _until(self._layers.input_grad_us + self._layers.weight_grad_us)

    @cached_property
    def layer_parameters(self) -> FloatArray:
        """[num_layers]: weights of every layer of the chain, with the extras that sit with it.

        A problem knows bytes alone: 2 of a frozen weight, and 6 of a trained one, of which more
        would change no share within a model that is trained as a whole.
        """
        found = np.zeros(self.num_layers)
        for module in self._modules:
            form = module.module
            per_weight = 6.0 if form.trainable else 2.0
            found[module.start : module.stop] = form.layer_static_bytes / per_weight
            found[module.start] += form.first_layer_extra.static_bytes / per_weight
            found[module.stop - 1] += form.last_layer_extra.static_bytes / per_weight
        return found

    @cached_property
    def _layers(self) -> ModulePart:
        return self.costs(StaticCut(num_ranks=1, num_layers=(1,) * self.num_layers)).total

    @cached_property
    def delay_at_us(self) -> FloatArray:
        """[num_layers + 1, M]: time of a transfer to another rank where the chain is cut there."""
        place = np.arange(self.num_layers + 1)[:, None]
        moved = np.zeros((self.num_layers + 1, self.problem.num_microbatches))
        for module in self._modules:
            is_inside = (place > module.start) & (place < module.stop)
            is_awaited = (place >= module.stop) & (place <= module.last_reader)
            moved += (is_inside | is_awaited) * module.boundary_bytes
        transfer = self.problem.transfer
        return transfer.latency_us + moved / transfer.bytes_per_us

    def has_backward(self, cut: StaticCut) -> list[bool]:
        """Per piece, whether something in it or before it is trainable."""
        return [end > self.first_trainable for end in np.cumsum(cut.num_layers).tolist()]

    def has_weight_grad(self, cut: StaticCut) -> list[bool]:
        """Per piece, whether anything in it is trained."""
        ends = np.cumsum(cut.num_layers).tolist()
        pieces = [range(end - num, end) for num, end in zip(cut.num_layers, ends, strict=True)]
        return [any(module.trains(piece) for module in self._modules) for piece in pieces]

    def costs(self, cut: StaticCut, num_recomputed: int | Sequence[int] = 0) -> PieceCosts:
        """What the pieces of ``cut`` cost.

        Args:
            cut: Layers per piece.
            num_recomputed: In every piece, or in each one, the first so many layers that have a
                backward are computed again there (Megatron's ``--recompute-method block``).

        Raises:
            PartitionError: The cut has another number of layers than the chain.
        """
        if sum(cut.num_layers) != self.num_layers:
            raise PartitionError(
                f"static cut of {sum(cut.num_layers)} layers for modules of {self.num_layers} "
                f"layers (expected as many)"
            )
        left = np.zeros(len(cut.num_layers), dtype=np.int64) + np.array(num_recomputed, np.int64)
        parts = []
        for module in self._modules:
            layers = _overlap(cut, module.start, module.stop)
            recomputed = np.minimum(left, _overlap(cut, module.backward_start, module.stop))
            left -= recomputed
            parts.append(_part(module, cut, layers, recomputed))
        total = ModulePart(*(sum(arrays) for arrays in zip(*parts, strict=True)))
        delay_us = self.delay_at_us[np.cumsum(cut.num_layers)[:-1]] * (cut.num_ranks > 1)
        return PieceCosts(tuple(parts), total, delay_us)


def _until(layer_us: FloatArray) -> FloatArray:
    return np.concatenate([np.zeros((1, layer_us.shape[1])), np.cumsum(layer_us, axis=0)])


def _overlap(cut: StaticCut, start: int, stop: int) -> IntArray:
    """[Q]: how many of the layers from ``start`` to ``stop`` every piece has."""
    ends = np.clip(np.cumsum(cut.num_layers), start, stop)
    return np.diff(ends, prepend=start)


def _part(
    module: _ModuleCosts, cut: StaticCut, layers: IntArray, recomputed: IntArray
) -> ModulePart:
    again = recomputed[:, None]
    # The pieces that hold the module's first and its last layer also hold its extras.
    before = np.cumsum(layers) - layers
    is_first = ((before == 0) & (layers > 0))[:, None]
    is_last = ((before + layers == module.stop - module.start) & (layers > 0))[:, None]

    first, form = module.first_with_backward, module.module
    with_backward = _overlap(cut, module.backward_start, module.stop)
    trained = np.zeros_like(layers)
    for span in form.trained_ranges:
        trained += _overlap(cut, module.start + span.start, module.start + span.stop)

    def time_us(kind: int, num: IntArray, has_first: bool, has_last: bool) -> FloatArray:
        extras = is_first * has_first * module.first_us[kind]
        return (
            num[:, None] * module.layer_us[kind]
            + extras
            + is_last * has_last * module.last_us[kind]
        )

    frozen_bytes = form.frozen_layer_static_bytes
    if frozen_bytes is None:
        frozen_bytes = form.layer_static_bytes
    static = trained * form.layer_static_bytes + (layers - trained) * frozen_bytes
    static += is_first[:, 0] * form.first_layer_extra.static_bytes
    static += is_last[:, 0] * form.last_layer_extra.static_bytes
    stored = with_backward[:, None] * module.activation_bytes
    stored -= again * (module.activation_bytes - module.boundary_bytes)
    stored += is_first * (first in (-1, 0)) * module.first_bytes
    stored += is_last * (first is not None) * module.last_bytes
    return ModulePart(
        forward_us=time_us(0, layers, True, True),
        input_grad_us=time_us(1, with_backward, first == -1, first is not None)
        + again * module.recompute_us,
        weight_grad_us=time_us(2, trained, form.trains_first_extra, form.trains_last_extra),
        stored_bytes=stored,
        static_bytes=static,
    )


def _module_costs(problem: Problem, name: str, starts: dict[str, int]) -> _ModuleCosts:
    module = problem.module(name)
    batches = [problem.items(name, number) for number in range(problem.num_microbatches)]
    has_items = np.array([bool(items) for items in batches])

    def totals(field: str) -> FloatArray:
        return np.array([fsum(getattr(item, field) for item in items) for items in batches])

    def total_bytes(field: str) -> IntArray:
        return np.array(
            [sum(getattr(item, field) for item in items) for items in batches], np.int64
        )

    overhead = has_items * module.layer_overhead_us
    fixed = {
        "first": has_items * module.first_layer_extra.forward_us,
        "last": has_items * module.last_layer_extra.forward_us,
    }

    def extras(end: str) -> tuple[FloatArray, FloatArray, FloatArray]:
        return (
            fixed[end] + totals(f"{end}_extra_forward_us"),
            totals(f"{end}_extra_input_grad_us"),
            totals(f"{end}_extra_weight_grad_us"),
        )

    readers = [starts[other.name] for other in problem.modules if name in other.upstream]
    return _ModuleCosts(
        name=name,
        start=starts[name],
        stop=starts[name] + module.num_layers,
        first_with_backward=problem.first_with_backward.get(name),
        module=module,
        layer_us=(
            overhead + totals("forward_us"),
            overhead + totals("input_grad_us"),
            totals("weight_grad_us"),
        ),
        first_us=extras("first"),
        last_us=extras("last"),
        recompute_us=overhead + totals("effective_recompute_us"),
        activation_bytes=total_bytes("activation_bytes"),
        boundary_bytes=total_bytes("boundary_bytes"),
        first_bytes=total_bytes("first_extra_activation_bytes"),
        last_bytes=total_bytes("last_extra_activation_bytes"),
        last_reader=max(readers, default=-1),
    )
