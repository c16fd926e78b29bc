"""Costs of any layer: what it computes follows from its weights.

With A weights that a token meets, of which T are trained, q channels of queries and n
tokens of an item:

- linear layers: 2 A n operations forward and for the input gradient, 2 T n for the weight gradient;
- cores of attention: 4 q sum(span^2) forward (half of it where causal), twice that backward;
- kept from forward to backward: see ``megatron_dip.costs.generic_kept``.

Weights are those of the built stages where they have been read, and are divided as those are; else
the widths state them.  Times follow measured steps, see ``megatron_dip.simulator.measured``.
"""

from megatron_dip.costs.operations import Operation, Sizes
from megatron_dip.costs.shapes import ModuleShape

__all__ = ["generic_after", "generic_before", "generic_layer"]


def generic_layer(
    module: ModuleShape, scores: float, sizes: Sizes, num_expert_ranks: int
) -> tuple[Operation, ...]:
    """One layer: the mean of all of them; weight gradients are those of a trained one.

    Args:
        scores: Of one head, on this rank as if it had all heads.
    """
    met, trained = _layer_weights(module, sizes, num_expert_ranks)
    layers = module.generic
    assert layers is not None
    share = (0.5 if layers.is_causal else 1.0) / sizes.tensor
    core = 4.0 * share * layers.attention_size * scores
    return (
        _linear("linear", sizes.rows, met, trained),
        Operation("attention", forward_flops=core, input_grad_flops=2 * core),
    )


def _layer_weights(module: ModuleShape, sizes: Sizes, num_expert_ranks: int) -> tuple[float, float]:
    """Weights of one layer that a token meets on one rank, and trained ones of a trained layer."""
    if module.weights is None:
        met = module.layer_linear_parameters() / sizes.tensor
        return met, met
    assert module.generic is not None
    # Each rank of an expert group holds a part of the experts, and gets the tokens of all.
    share = min(1.0, module.generic.expert_share * num_expert_ranks)
    every = [layer.met(share)[0] for layer in module.weights.layers]
    trained = [layer.met(share)[1] for layer in module.weights.layers_like(trained=True)]
    return sum(every) / len(every), sum(trained) / len(trained)


def generic_before(module: ModuleShape, sizes: Sizes) -> tuple[Operation, ...]:
    """A table of tokens takes no operations; what else there is, one product per token."""
    if module.vocab_size is not None:
        return (Operation("before", part="before"),)
    met, trained = _end_weights(module, is_first=True)
    one = _linear("before", sizes.rows, met, trained)
    return (one._replace(input_grad_flops=0.0, part="before"),)


def generic_after(module: ModuleShape, output_rows: float, sizes: Sizes) -> tuple[Operation, ...]:
    """The head, also where it shares its weights with the embedding; else a projection of rows."""
    if module.vocab_size is not None and module.has_head:
        head = module.hidden_size * module.vocab_size / sizes.tensor
        return (_linear("after", sizes.rows, head, head)._replace(part="after"),)
    met, trained = _end_weights(module, is_first=False)
    return (_linear("after", output_rows, met, trained)._replace(part="after"),)


def _end_weights(module: ModuleShape, *, is_first: bool) -> tuple[float, float]:
    if module.weights is not None:
        return (module.weights.before if is_first else module.weights.after).met(1.0)
    stated = module.first_parameters() if is_first else module.last_parameters()
    return float(stated), float(stated)


def _linear(name: str, rows: float, met: float, trained: float) -> Operation:
    flops = 2.0 * rows * met
    return Operation(name, flops, flops, 2.0 * rows * trained)
