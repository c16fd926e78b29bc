"""What the cost of a layer is made of: kernels, with their operations and bytes on one rank."""

from typing import NamedTuple

from megatron_dip.costs.trained_parts import LAYERS

__all__ = ["Operation", "Sizes"]


class Operation(NamedTuple):
    """One kernel of a layer on one rank; a phase that it has no part in is zero."""

    name: str
    forward_flops: float = 0.0
    input_grad_flops: float = 0.0
    weight_grad_flops: float = 0.0
    forward_bytes: float = 0.0
    input_grad_bytes: float = 0.0
    weight_grad_bytes: float = 0.0
    reduced_bytes: float = 0.0
    """Joined over the tensor-parallel ranks after it, forward and in the input gradient."""
    ring_bytes: float = 0.0
    """Sent to the next context-parallel rank beside it, forward; twice that in the gradient."""
    part: str = LAYERS
    """The part of its module that its weights belong to; ``adapter`` in a layer is beside them."""


class Sizes(NamedTuple):
    """One item on one rank."""

    rows: float
    """Tokens in a tensor-parallel region."""
    rows_between: float
    """Tokens between the regions."""
    tensor: int
    bytes_per_value: int
