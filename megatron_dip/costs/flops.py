"""Floating-point operations of a batch: the useful ones, of the whole model, on all ranks together.

Of every module, by what is in its items: forwards, gradients of inputs as far back as anything is
trained, and gradients of trained weights.  What a schedule computes again is not counted, nor is
what is no linear layer and no core of attention (see ``megatron_dip.costs.layers``).
"""

from collections.abc import Callable, Sequence

from megatron_dip.costs.layers import (
    Operation,
    Parallelism,
    first_operations,
    last_operations,
    layer_operations,
    trains,
)
from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.costs.sizes import ItemSize, ItemSizes

__all__ = ["batch_flops", "item_flops"]

_WHOLE = Parallelism()
_Operations = Callable[[ModuleShape, ItemSize, Parallelism, int], tuple[Operation, ...]]


def batch_flops(model: ModelShape, microbatches: Sequence[ItemSizes]) -> float:
    """Operations of one step of training on ``microbatches``."""
    ends = model.first_with_backward()
    known: dict[tuple[str, int, tuple[int, ...], int], float] = {}
    total = 0.0
    for microbatch in microbatches:
        for module in model.modules:
            for size in microbatch.get(module.name, ()):
                key = (module.name, size.tokens, size.spans, size.context_tokens)
                if key not in known:
                    has_upstream = any(name in ends for name in module.upstream)
                    known[key] = item_flops(module, size, ends.get(module.name), has_upstream)
                total += known[key]
    return total


def item_flops(
    module: ModuleShape, size: ItemSize, end: int | None, has_upstream: bool = False
) -> float:
    """Operations of one item in all of its module.

    Args:
        end: Where backwards of the module end, as :meth:`ModelShape.first_with_backward` has it.
        has_upstream: Whether a gradient goes on to a module that this one reads.
    """

    def operations(make: _Operations) -> tuple[Operation, ...]:
        return make(module, size, _WHOLE, 2)

    layer, last = operations(layer_operations), operations(last_operations)
    num_with_backward = 0 if end is None else module.num_layers - max(end, 0)
    num_trained = sum(map(len, module.trained_layers()))
    return (
        _first_flops(module, operations(first_operations), has_upstream)
        + module.num_layers * sum(one.forward_flops for one in layer)
        + num_with_backward * sum(one.input_grad_flops for one in layer)
        + num_trained * sum(one.weight_grad_flops for one in layer if trains(module, one))
        + _last_flops(module, last, end is not None and end < module.num_layers)
    )


def _first_flops(module: ModuleShape, operations: Sequence[Operation], has_upstream: bool) -> float:
    """What comes before the first layer stands side by side: no part hands gradients to another."""
    return sum(
        operation.forward_flops
        + has_upstream * operation.input_grad_flops
        + trains(module, operation) * operation.weight_grad_flops
        for operation in operations
    )


def _last_flops(module: ModuleShape, operations: Sequence[Operation], has_gradient: bool) -> float:
    """``has_gradient``: whether gradients go on to the layers before ``operations``."""
    total = 0.0
    for operation in operations:
        is_trained = trains(module, operation)
        total += operation.forward_flops
        total += has_gradient * operation.input_grad_flops
        total += is_trained * operation.weight_grad_flops
        # What follows something trained hands its gradient on to it.
        has_gradient = has_gradient or is_trained
    return total
