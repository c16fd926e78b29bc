"""Operations of one layer on one rank: floating-point operations, bytes, collectives.

Notation: n tokens, h hidden, k width of keys (and of values), f of the MLP, s a span, t and c the
tensor- and context-parallel sizes, m tokens that cross-attention reads.

- A linear layer of i inputs and o outputs takes 2 n i o operations forward, as many for the
  gradient of its input and as many for that of its weight, divided by t and c.
- The core of attention takes 4 s^2 h per span (half where causal) forward and twice that backward;
  the core of cross-attention 4 s m h.  Cores have no weights.  Recomputing the scores inside the
  backward kernel is not counted: it is no useful work, and rates are measured without it.
- Experts take what their linear layers take for ``top_k`` times the tokens, taken to be spread
  evenly over them; their tokens are put in order and back, which moves bytes.  The exchange of
  tokens among expert-parallel ranks is not counted.
- Norms, activations, residuals and modulation move bytes only.
- Tensor parallelism joins the outputs of attention, cross-attention and MLP: one all-reduce each,
  or with sequence parallelism an all-gather and a reduce-scatter of together the same volume,
  forward and again in the input gradient.  Sequence parallelism's gather for the weight gradient
  is overlapped by Megatron and not counted.
- Context parallelism sends keys and values around a ring behind the core of attention.  Causal
  attention is balanced over the ranks.  Encoders are whole on every rank.

Bytes are of activations alone: an item adds no traffic of weights to a kernel that runs anyway.
"""

from collections.abc import Sequence

from pydantic import Field

from megatron_dip.costs.generic import generic_after, generic_before, generic_layer
from megatron_dip.costs.operations import Operation, Sizes
from megatron_dip.costs.shape_parts import NUM_EXPERTS, TIMESTEP_VALUES
from megatron_dip.costs.shapes import ExpertsShape, ModuleShape
from megatron_dip.costs.sizes import ItemSize
from megatron_dip.forms import Form
from megatron_dip.limits import Size

__all__ = [
    "Parallelism",
    "entered_share",
    "first_operations",
    "last_operations",
    "layer_operations",
    "total_flops",
    "trains",
]

_LOSS_BYTES = 4
"""Losses are computed in fp32, whatever the type of activations."""


class Parallelism(Form):
    """How one layer is divided."""

    tensor: Size = 1
    context: Size = 1
    expert: Size = Field(default=1, exclude_if=lambda size: size == 1)
    sequence_parallel: bool = False
    """Norms and boundaries hold 1/tensor of the tokens."""

    @property
    def sequence_shards(self) -> int:
        """Ranks over which the tokens between the parallel regions are divided."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    def of(self, module: ModuleShape) -> "Parallelism":
        """How the layers of ``module`` are divided.

        Context-parallel ranks each have all rows of what encodes: images are whole on every rank,
        as in Megatron's LLaVA, and only what reads them is divided.
        """
        if self.context == 1 or module.divides_rows:
            return self
        return self.model_copy(update={"context": 1})


ADAPTER = "adapter"


def trains(module: ModuleShape, operation: Operation) -> bool:
    """Whether ``operation`` makes a weight gradient in ``module``, in a layer that is trained."""
    if operation.part == ADAPTER:
        return module.trains_adapters
    return operation.part in module.trained.parts


def entered_share(module: ModuleShape, operations: Sequence[Operation]) -> float:
    """Of ``operations`` that nothing trained comes before, how much of the input gradients there
    is: those of what follows the first one that is trained."""
    whole = sum(operation.input_grad_flops for operation in operations)
    first = next((n for n, one in enumerate(operations) if trains(module, one)), len(operations))
    needed = sum(operation.input_grad_flops for operation in operations[first + 1 :])
    return needed / whole if whole else 0.0


def _sizes(size: ItemSize, parallel: Parallelism, bytes_per_value: int) -> Sizes:
    return Sizes(
        rows=size.tokens / parallel.context,
        rows_between=size.tokens / parallel.sequence_shards,
        tensor=parallel.tensor,
        bytes_per_value=bytes_per_value,
    )


def _linear(
    name: str,
    sizes: Sizes,
    inputs: int,
    outputs: int,
    *,
    rows: float | None = None,
    divides_inputs: bool = False,
    reduced_bytes: float = 0.0,
) -> Operation:
    """A linear layer whose weight is divided over the tensor-parallel ranks.

    Either its outputs are divided, and every rank reads whole rows, or its inputs, and every rank
    writes a part of the sum of whole rows.
    """
    rows = sizes.rows if rows is None else rows
    flops = 2.0 * rows * inputs * outputs / sizes.tensor
    whole, divided = (outputs, inputs) if divides_inputs else (inputs, outputs)
    moved = sizes.bytes_per_value * rows * (whole + divided / sizes.tensor)
    return Operation(name, flops, flops, flops, moved, moved, moved, reduced_bytes=reduced_bytes)


def _elementwise(name: str, sizes: Sizes, rows: float, width: float, num_tensors: int) -> Operation:
    """Reads and writes ``num_tensors`` rows of ``width`` forward, one more for the gradient."""
    one = sizes.bytes_per_value * rows * width
    return Operation(
        name, forward_bytes=num_tensors * one, input_grad_bytes=(num_tensors + 1) * one
    )


def _attention(
    module: ModuleShape, size: ItemSize, parallel: Parallelism, sizes: Sizes
) -> Operation:
    shards = parallel.tensor * parallel.context
    share = 0.5 if module.kind == "causal" else 1.0
    flops = share * sum(4.0 * span * span * module.hidden_size for span in size.spans) / shards
    key_values = 2 * module.key_value_size
    moved = (
        sizes.bytes_per_value * sizes.rows * (2 * module.hidden_size + key_values) / sizes.tensor
    )
    sent = sizes.bytes_per_value * sizes.rows * key_values / sizes.tensor * (parallel.context - 1)
    return Operation(
        "attention",
        forward_flops=flops,
        input_grad_flops=2 * flops,
        forward_bytes=moved,
        input_grad_bytes=2 * moved,
        ring_bytes=sent,
    )


def layer_operations(
    module: ModuleShape, size: ItemSize, parallel: Parallelism, bytes_per_value: int
) -> tuple[Operation, ...]:
    """One layer of ``module`` on one item, in the order of its forward."""
    parallel = parallel.of(module)
    sizes = _sizes(size, parallel, bytes_per_value)
    if module.kind == "generic":
        scores = sum(float(span) * span for span in size.spans) / parallel.context
        return generic_layer(module, scores, sizes, parallel.expert)
    hidden, ffn = module.hidden_size, module.ffn_hidden_size
    joined = bytes_per_value * sizes.rows * hidden
    gate = 2 if module.is_gated else 1
    between = sizes.rows_between
    # A modulated norm reads and writes what a plain one does; a gate reads one row more.
    residual_tensors = 4 if module.kind == "dit" else 3
    operations = [
        _elementwise("attention_norm", sizes, between, hidden, 2),
        *_adapter(module, sizes),
        _linear("query_key_value", sizes, hidden, hidden + 2 * module.key_value_size),
        _attention(module, size, parallel, sizes),
        _linear(
            "attention_output", sizes, hidden, hidden, divides_inputs=True, reduced_bytes=joined
        ),
        _elementwise("attention_residual", sizes, between, hidden, residual_tensors),
    ]
    if module.kind == "dit":
        operations += _cross_attention(module, size, parallel, sizes)
        operations += _layer_modulation(module, size, sizes)
    operations.append(_elementwise("mlp_norm", sizes, between, hidden, 2))
    if module.experts is not None:
        operations += _experts(module.experts, hidden, sizes, joined)
    else:
        operations += [
            _linear("mlp_in", sizes, hidden, gate * ffn),
            _elementwise("mlp_activation", sizes, sizes.rows, ffn / sizes.tensor, gate + 1),
            _linear("mlp_out", sizes, ffn, hidden, divides_inputs=True, reduced_bytes=joined),
        ]
    operations.append(_elementwise("mlp_residual", sizes, between, hidden, residual_tensors))
    return tuple(operations)


def _experts(
    experts: ExpertsShape, hidden: int, sizes: Sizes, joined_bytes: float
) -> list[Operation]:
    """The router, whole on every rank; the experts' gated MLPs; the shared one."""
    whole, routed = sizes._replace(tensor=1), experts.top_k * sizes.rows
    ffn, between = experts.ffn_hidden_size, sizes.rows_between
    shared = experts.shared_ffn_hidden_size
    operations = [
        _linear("router", whole, hidden, experts.num_experts, rows=between),
        _elementwise("dispatch", sizes, experts.top_k * between, hidden, 2),
        _linear("experts_in", sizes, hidden, 2 * ffn, rows=routed),
        _elementwise("experts_activation", sizes, routed, ffn / sizes.tensor, 3),
        _linear(
            "experts_out",
            sizes,
            ffn,
            hidden,
            rows=routed,
            divides_inputs=True,
            reduced_bytes=experts.top_k * joined_bytes,
        ),
        _elementwise("combine", sizes, experts.top_k * between, hidden, 2),
    ]
    if shared is None:
        return operations
    return [
        *operations,
        _linear("shared_in", sizes, hidden, 2 * shared),
        _elementwise("shared_activation", sizes, sizes.rows, shared / sizes.tensor, 3),
        _linear(
            "shared_out", sizes, shared, hidden, divides_inputs=True, reduced_bytes=joined_bytes
        ),
    ]


def _adapter(module: ModuleShape, sizes: Sizes) -> list[Operation]:
    """The adapter's two products and its router, whole on every tensor-parallel rank.

    Both experts are one product of twice the bottleneck's width.  Narrow products are bound by
    reading and writing wide rows, which the second one does three times.
    """
    if module.adapter is None:
        return []
    whole, rows = sizes._replace(tensor=1), sizes.rows_between
    hidden, narrow = module.hidden_size, module.adapter.bottleneck
    wide = 2 * sizes.bytes_per_value * rows * hidden
    inner = NUM_EXPERTS * narrow // module.adapter.num_groups
    up = _linear("adapter_up", whole, inner, hidden, rows=rows)
    operations = [
        _linear("adapter_down", whole, hidden, narrow, rows=rows),
        _linear("adapter_router", whole, hidden, NUM_EXPERTS, rows=rows),
        up._replace(
            forward_bytes=up.forward_bytes + wide, input_grad_bytes=up.input_grad_bytes + wide
        ),
    ]
    return [operation._replace(part=ADAPTER) for operation in operations]


def _cross_attention(
    module: ModuleShape, size: ItemSize, parallel: Parallelism, sizes: Sizes
) -> list[Operation]:
    hidden = module.hidden_size
    rows, context = sizes.rows, float(size.context_tokens)
    flops = 4.0 * rows * context * hidden / sizes.tensor
    moved = sizes.bytes_per_value * 2 * (rows + context) * hidden / sizes.tensor
    return [
        _elementwise("cross_norm", sizes, sizes.rows_between, hidden, 2),
        _linear("cross_query", sizes, hidden, hidden),
        # Every context-parallel rank reads the whole caption.
        _linear("cross_key_value", sizes, hidden, 2 * hidden, rows=context),
        Operation(
            "cross_attention",
            forward_flops=flops,
            input_grad_flops=2 * flops,
            forward_bytes=moved,
            input_grad_bytes=2 * moved,
        ),
        _linear(
            "cross_output",
            sizes,
            hidden,
            hidden,
            divides_inputs=True,
            reduced_bytes=sizes.bytes_per_value * rows * hidden,
        ),
        _elementwise("cross_residual", sizes, sizes.rows_between, hidden, 3),
    ]


def _layer_modulation(module: ModuleShape, size: ItemSize, sizes: Sizes) -> list[Operation]:
    """A network in every layer reads one row per clip, whole on every tensor-parallel rank."""
    if module.modulation == "shared":
        return []
    whole = sizes._replace(tensor=1)
    hidden = module.hidden_size
    return [_linear("modulation", whole, hidden, 6 * hidden, rows=len(size.spans))]


def first_operations(
    module: ModuleShape, size: ItemSize, parallel: Parallelism, bytes_per_value: int
) -> tuple[Operation, ...]:
    """What sits before the first layer; nothing in it takes the gradient of its own input.

    Except a caption projection, whose gradient goes on to a text encoder.
    """
    parallel = parallel.of(module)
    sizes = _sizes(size, parallel, bytes_per_value)
    hidden = module.hidden_size
    if module.kind == "generic":
        return generic_before(module, sizes)
    if module.kind == "causal":
        # Every rank looks up its share of the vocabulary and adds the others' rows.
        moved = bytes_per_value * sizes.rows * hidden
        return (
            Operation(
                "embedding",
                part="embedding",
                forward_bytes=2 * moved,
                weight_grad_bytes=3 * moved,
                reduced_bytes=moved,
            ),
        )
    # The embedding of patches is small and whole on every rank.
    whole = sizes._replace(tensor=1)
    patches = _linear("patch_embedding", whole, module.patch_values or 0, hidden)
    patches = patches._replace(input_grad_flops=0.0, input_grad_bytes=0.0, part="embedding")
    if module.kind == "vit":
        return (patches,)
    clips = float(len(size.spans))
    timestep = _linear("timestep", whole, TIMESTEP_VALUES + hidden, hidden, rows=clips)
    caption = _linear(
        "caption_projection", whole, module.context_size or 0, hidden, rows=size.context_tokens
    )
    conditioning = [timestep._replace(part="time"), caption._replace(part="text_projection")]
    if module.modulation == "shared":
        shared = _linear("modulation", whole, hidden, 6 * hidden, rows=clips)
        conditioning.append(shared._replace(part="time"))
    return (patches, *conditioning)


def last_operations(
    module: ModuleShape, size: ItemSize, parallel: Parallelism, bytes_per_value: int
) -> tuple[Operation, ...]:
    """What sits after the last layer."""
    parallel = parallel.of(module)
    sizes = _sizes(size, parallel, bytes_per_value)
    hidden = module.hidden_size
    if module.kind == "generic":
        return generic_after(module, size.num_output_rows / parallel.context, sizes)
    norm = _elementwise("final_norm", sizes, sizes.rows_between, hidden, 2)._replace(part="norm")
    if module.kind == "causal":
        if not module.has_head:
            return (norm,)
        vocabulary = module.vocab_size or 0
        loss = _elementwise(
            "loss",
            sizes._replace(bytes_per_value=_LOSS_BYTES),
            sizes.rows,
            vocabulary / sizes.tensor,
            2,
        )
        head = _linear("head", sizes, hidden, vocabulary)
        return (norm, head._replace(part="head"), loss._replace(part="head"))
    if module.kind == "dit":
        whole = sizes._replace(tensor=1)
        clips = float(len(size.spans))
        modulation = _linear("final_modulation", whole, hidden, 2 * hidden, rows=clips)
        output = _linear("output", whole, hidden, module.patch_values or 0)
        return tuple(part._replace(part="output") for part in (norm, modulation, output))
    if module.projector is None:
        return (norm,)
    rows = sizes.rows / module.projector.merge
    middle = module.projector.intermediate_size
    joined = bytes_per_value * rows * module.projector.output_size
    inner = _linear("projector_in", sizes, module.projector.merge * hidden, middle, rows=rows)
    outer = _linear(
        "projector_out",
        sizes,
        middle,
        module.projector.output_size,
        rows=rows,
        divides_inputs=True,
        reduced_bytes=joined,
    )
    return (norm, inner._replace(part="projector"), outer._replace(part="projector"))


def total_flops(operations: Sequence[Operation]) -> tuple[float, float, float]:
    """Forward, input gradient and weight gradient of all ``operations``."""
    return (
        sum(operation.forward_flops for operation in operations),
        sum(operation.input_grad_flops for operation in operations),
        sum(operation.weight_grad_flops for operation in operations),
    )
