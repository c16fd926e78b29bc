"""The adapter with its router, and which row's gate weighs which row.

Notation: N rows on this rank, H hidden, r the bottleneck, G groups, K = 2 experts::

    u   = dropout(D z + b_D)                    D [r, H]
    f_k = U_k u + b_k                           U_k grouped: outputs of group g read r / G of u
    w   = softmax((W x + b_W) / temperature)    x the row that the gate comes from
    z'  = z + scale * sum_k w_k f_k

U_k and b_k start at zero, so that the adapter starts as the identity; the gradients of D, b_D, W
and b_W are then exactly zero in the first step.  One dropout mask serves both experts.  The
released code also rounds w to 16 bits, which is not done here.

All parameters are whole on every tensor-parallel rank.  Without sequence parallelism the gradient
of the adapter's output is whole as well, so ranks agree by themselves.  With it, rows are divided:
gates are made where their source rows are and shared by a sum over the ranks, and every parameter
is marked, so that Megatron adds up the ranks' parts of its gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

__all__ = [
    "NUM_EXPERTS",
    "AdapterOptions",
    "RoutedAdapter",
    "Routing",
    "initial_distribution",
]

NUM_EXPERTS = 2


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Shape of the adapters of one tower."""

    bottleneck: int = 8
    num_groups: int = 2
    temperature: float = 10.0
    """Divides the router's logits; published: 10 for 7B and 5 for 13B, in both towers."""
    dropout: float = 0.1
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Whose gate weighs the experts of a row; by default every row's own.

    Both tensors are about all rows, whatever part of them this rank holds.
    """

    source_rows: Tensor | None = None
    """[R] int64: the rows that gates are made of."""
    gate_of_row: Tensor | None = None
    """[N of all ranks] int64: the place in ``source_rows`` of each row's gate."""


class _GroupedUp(torch.nn.Module):
    """The up-projections of all experts: weight [K, H, r / G], bias [K, H]."""

    def __init__(self, hidden_size: int, options: AdapterOptions, dtype: torch.dtype) -> None:
        super().__init__()
        narrow = options.bottleneck // options.num_groups
        self.weight = torch.nn.Parameter(torch.zeros(NUM_EXPERTS, hidden_size, narrow, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(NUM_EXPERTS, hidden_size, dtype=dtype))

    def forward(self, narrow: Tensor, gates: Tensor) -> Tensor:
        """``[N, r]`` weighed by gates ``[N, K]`` to ``[N, H]``: both experts in one product."""
        num_experts, hidden, width = self.weight.shape
        num_groups = narrow.shape[1] // width
        weighed = gates[:, :, None] * narrow[:, None, :]
        grouped = self.weight.view(num_experts, num_groups, hidden // num_groups, width)
        mixed = torch.einsum(
            "nkgr,kghr->ngh", weighed.view(-1, num_experts, num_groups, width), grouped
        )
        return mixed.reshape(-1, hidden) + gates @ self.bias


class RoutedAdapter(torch.nn.Module):
    """The adapter of one layer.

    ``routing`` belongs to the rows under way: the layer sets it for the time of one call, also when
    a call is repeated for recomputation.
    """

    def __init__(
        self,
        hidden_size: int,
        options: AdapterOptions,
        *,
        dtype: torch.dtype,
        sequence_parallel: bool,
        tensor_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        if options.bottleneck % options.num_groups or hidden_size % options.num_groups:
            raise ValueError(
                f"an adapter of {options.num_groups} groups needs a bottleneck and a hidden size "
                f"that divide by it, not {options.bottleneck} and {hidden_size}"
            )
        self.options = options
        self.routing: Routing | None = None
        self.down = torch.nn.Linear(hidden_size, options.bottleneck, dtype=dtype)
        self.up = _GroupedUp(hidden_size, options, dtype)
        self.router = torch.nn.Linear(hidden_size, NUM_EXPERTS, dtype=dtype)
        self._is_sharded = sequence_parallel and tensor_group.size() > 1
        self._tensor_group = tensor_group
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, rows: Tensor) -> Tensor:
        """``[N, 1, H]`` to the same; ``rows`` are normalised.

        Raises:
            RuntimeError: No layer has said what the rows belong to.
        """
        if self.routing is None:
            raise RuntimeError(
                "an adapter was run outside of its layer (leave 'layernorm' out of "
                "--recompute-modules: it repeats norms without telling whose rows they are)"
            )
        flat = rows.reshape(-1, rows.shape[-1])
        gates = self._gates_of_rows(flat, self.routing).to(flat.dtype)
        narrow = torch.nn.functional.dropout(
            self.down(flat), self.options.dropout, training=self.training
        )
        return rows + (self.options.scale * self.up(narrow, gates)).view_as(rows)

    def gates(self, rows: Tensor) -> Tensor:
        """``[R, H]`` to gates ``[R, K]``, in 32 bits or more."""
        logits: Tensor = self.router(rows) / self.options.temperature
        return torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)

    def _gates_of_rows(self, rows: Tensor, routing: Routing) -> Tensor:
        if routing.source_rows is None or routing.gate_of_row is None:
            return self.gates(rows)
        if not self._is_sharded:
            return self.gates(rows[routing.source_rows])[routing.gate_of_row]
        count = rows.shape[0]
        first = self._tensor_group.rank() * count
        places = routing.source_rows - first
        is_here = ((places >= 0) & (places < count)).unsqueeze(1)
        own = self.gates(rows[places.clamp(0, count - 1)]) * is_here
        # Forward adds up to the whole table; backward adds up what all ranks' rows make of it.
        table = reduce_from_tensor_model_parallel_region(own, group=self._tensor_group)
        table = copy_to_tensor_model_parallel_region(table, group=self._tensor_group)
        return table[routing.gate_of_row[first : first + count]]


def initial_distribution(name: str, hidden_size: int) -> Callable[[Tensor], object] | None:
    """How an adapter's parameter called ``name`` starts; None where it is none of an adapter."""
    if name.endswith("adapter.down.weight"):
        return torch.nn.init.xavier_uniform_
    if name.endswith(("adapter.router.weight", "adapter.router.bias")):
        # What a linear layer of torch starts with.
        bound = 1.0 / math.sqrt(hidden_size)
        return partial(torch.nn.init.uniform_, a=-bound, b=bound)
    if name.endswith(("adapter.down.bias", "adapter.up.weight", "adapter.up.bias")):
        return torch.nn.init.zeros_
    return None
