"""Times of layers from operations, bytes and a device's rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from megatron_dip.costs.devices import Device
from megatron_dip.costs.kernels import Kernels
from megatron_dip.costs.layers import (
    Operation,
    Parallelism,
    first_operations,
    last_operations,
    layer_operations,
    trains,
)
from megatron_dip.costs.repeats import repeated_share
from megatron_dip.costs.shapes import ModuleShape
from megatron_dip.costs.sizes import ItemSize

__all__ = ["AnalyticTimes", "LayerTimes", "PhaseTimes"]


class PhaseTimes(NamedTuple):
    """Microseconds that one item adds to a call."""

    forward_us: float
    input_grad_us: float
    weight_grad_us: float


class LayerTimes(Protocol):
    """What a problem needs to know of time; analytic or measured."""

    def overhead_us(self, module: ModuleShape) -> float:
        """Cost of calling one layer, whatever its size."""
        ...

    def layer(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in one layer."""
        ...

    def first_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits before the first layer."""
        ...

    def last_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits after the last layer."""
        ...


_Operations = Callable[[ModuleShape, ItemSize, Parallelism, int], tuple[Operation, ...]]


@dataclass(frozen=True, kw_only=True)
class AnalyticTimes:
    """Times on a device; every operation is a kernel of its own.

    Args:
        device: Rates for modules that ``module_devices`` does not name.
        tensor_link_bytes_per_us: What a tensor-parallel collective achieves per rank.
        ring_link_bytes_per_us: What a context-parallel rank sends to the next.
        kernels: Of which only what Megatron recomputes is read.
        layers_per_stage: Mean per module; of the others no stage has more than Megatron recomputes.
    """

    device: Device
    parallel: Parallelism
    bytes_per_value: int = 2
    tensor_link_bytes_per_us: float
    ring_link_bytes_per_us: float
    module_devices: Mapping[str, Device] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=Kernels)
    layers_per_stage: Mapping[str, float] = field(default_factory=dict)

    def overhead_us(self, module: ModuleShape) -> float:
        """Launches, start-up of collectives, and start-up of kernels.

        The form of problems charges it to the forward and to the input gradient, and nothing to the
        weight gradient: so each of the two gets half of the start-up of all three.
        """
        probe = layer_operations(
            module, ItemSize(tokens=1, spans=(1,), context_tokens=1), self.parallel, 2
        )
        num_kernels = sum(
            (operation.forward_flops > 0)
            + (operation.input_grad_flops > 0)
            + (operation.weight_grad_flops > 0 and trains(module, operation))
            for operation in probe
        )
        num_collectives = sum(operation.reduced_bytes > 0 for operation in probe)
        collectives = num_collectives if self.parallel.tensor > 1 else 0
        device = self._device(module)
        return (
            device.layer_overhead_us
            + device.start_us() * num_kernels / 2
            + device.collective_latency_us * collectives
        )

    def layer(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in one layer, with what Megatron recomputes of it in the input gradient."""
        times = self._times(layer_operations, module, size)
        if self.kernels.recompute is None:
            return times
        num_layers = self.layers_per_stage.get(module.name, 1.0)
        operations = layer_operations(module, size, self.parallel, self.bytes_per_value)
        again_us = sum(
            repeated_share(self.kernels, operation.name, num_layers)
            * self._forward_us(module, operation)
            for operation in operations
        )
        return times._replace(input_grad_us=times.input_grad_us + again_us)

    def first_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits before the first layer."""
        return self._times(first_operations, module, size)

    def last_extra(self, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        """One item in what sits after the last layer."""
        return self._times(last_operations, module, size)

    def call_us(self, module: ModuleShape, sizes: Sequence[ItemSize]) -> float:
        """Forward of one layer on several items at once, each kernel timed by its whole size.

        What the overhead and the items' times approximate by a sum; weights are read once.
        """
        device = self._device(module)
        per_item = [
            layer_operations(module, size, self.parallel, self.bytes_per_value) for size in sizes
        ]
        weights = self.bytes_per_value * module.layer_linear_parameters() / self.parallel.tensor
        linear = sum(operation.weight_grad_flops for operation in per_item[0])
        total = device.layer_overhead_us
        for kernels in zip(*per_item, strict=True):
            share = kernels[0].weight_grad_flops / linear
            flops = sum(kernel.forward_flops for kernel in kernels)
            moved = sum(kernel.forward_bytes for kernel in kernels) + weights * share
            total += device.kernel_us(flops, moved)
            joined = sum(kernel.reduced_bytes for kernel in kernels)
            if joined and self.parallel.tensor > 1:
                total += device.collective_latency_us + self._collective_us(joined)
        return total

    def _times(self, make: _Operations, module: ModuleShape, size: ItemSize) -> PhaseTimes:
        item_us = self._device(module).item_us
        forward = input_grad = weight_grad = 0.0
        for operation in make(module, size, self.parallel, self.bytes_per_value):
            joined = self._collective_us(operation.reduced_bytes)
            ring = operation.ring_bytes / self.ring_link_bytes_per_us
            forward += self._forward_us(module, operation)
            input_grad += max(
                item_us(operation.input_grad_flops, operation.input_grad_bytes), 2 * ring
            )
            if operation.input_grad_flops or operation.input_grad_bytes:
                input_grad += joined
            if trains(module, operation):
                weight_grad += item_us(operation.weight_grad_flops, operation.weight_grad_bytes)
        return PhaseTimes(forward, input_grad, weight_grad)

    def _forward_us(self, module: ModuleShape, operation: Operation) -> float:
        ring_us = operation.ring_bytes / self.ring_link_bytes_per_us
        own_us = self._device(module).item_us(operation.forward_flops, operation.forward_bytes)
        return self._collective_us(operation.reduced_bytes) + max(own_us, ring_us)

    def _device(self, module: ModuleShape) -> Device:
        return self.module_devices.get(module.name, self.device)

    def _collective_us(self, num_bytes: float) -> float:
        """An all-reduce, as a ring: every rank sends and receives 2 (t - 1) / t of the bytes."""
        ranks = self.parallel.tensor
        return 2 * (ranks - 1) / ranks * num_bytes / self.tensor_link_bytes_per_us
