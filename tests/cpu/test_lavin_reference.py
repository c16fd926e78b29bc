"""The language tower against LaVIN's published form, written out in plain torch.

There a sample is one sequence whose first row is the modality row, under a mask that is causal and
hides that row from all others; every layer takes its gates from it.  Here it is a span of its own.
"""

import pytest
import torch
from lavin_setup import language_stages, microbatch, move_adapters
from models_setup import base_config, megatron_on_cpu
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softmax

HEADS, HIDDEN, EPSILON = 4, 48, 1e-6


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


def rotated(rows: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... of ``[T, heads, d]``."""
    length, _, width = rows.shape
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000.0**-powers)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    left, right = rows.chunk(2, dim=-1)
    return rows * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def adapted(adapter: torch.nn.Module, rows: Tensor) -> Tensor:
    """The adapter with the gates of row 0, expert by expert and group by group."""
    narrow = rows @ adapter.down.weight.T + adapter.down.bias
    logits = adapter.router.weight @ rows[0] + adapter.router.bias
    gates = softmax(logits / adapter.options.temperature, dim=0)
    parts = narrow.chunk(2, dim=-1)
    total = rows
    for expert in range(2):
        halves = adapter.up.weight[expert].chunk(2)
        wide = torch.cat([part @ half.T for part, half in zip(parts, halves, strict=True)], dim=-1)
        total = total + gates[expert] * (wide + adapter.up.bias[expert])
    return total


def attention(layer: torch.nn.Module, rows: Tensor) -> Tensor:
    length = rows.shape[0]
    joined = (rows @ layer.self_attention.linear_qkv.weight.T).view(length, HEADS, -1)
    query, key, value = joined.chunk(3, dim=-1)
    query, key = rotated(query), rotated(key)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    visible = torch.ones(length, length).tril().bool()
    visible[1:, 0] = False
    weights = softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, value).reshape(length, HIDDEN)
    return mixed @ layer.self_attention.linear_proj.weight.T


def norm(module: torch.nn.Module, rows: Tensor) -> Tensor:
    return rms_norm(rows, (HIDDEN,), module.weight, EPSILON)


def reference_logits(stage: torch.nn.Module, tokens: Tensor, modality: int) -> Tensor:
    """``[T, V]`` of one sample; the first of the ``tokens`` is the modality row."""
    model = stage.language_model
    words = model.embedding.word_embeddings.weight[tokens[1:]]
    rows = torch.cat([stage.adapter_modality.weight[modality : modality + 1], words])
    for layer in model.decoder.layers:
        rows = rows + attention(
            layer, adapted(layer.input_layernorm.adapter, norm(layer.input_layernorm, rows))
        )
        gate, up = (norm(layer.pre_mlp_layernorm, rows) @ layer.mlp.linear_fc1.weight.T).chunk(
            2, -1
        )
        rows = rows + (silu(gate) * up) @ layer.mlp.linear_fc2.weight.T
    return norm(model.decoder.final_layernorm, rows) @ model.output_layer.weight.T


def test_losses_and_gradients_are_those_of_the_published_form():
    lengths = (14, 11, 17)
    batch = microbatch(lengths, (False, False, False)).sub_batch("language", range(3))
    (stage,), (other,) = language_stages(base_config()), language_stages(base_config())
    move_adapters([stage, other])
    losses = stage(None, batch)
    (losses * batch.loss_mask).sum().backward()
    expected = []
    for tokens, labels in zip(
        batch.tokens.split([length + 1 for length in lengths]),
        batch.labels.split([length + 1 for length in lengths]),
        strict=True,
    ):
        logits = reference_logits(other, tokens, 0)
        expected.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    theirs = torch.cat(expected)
    (theirs * batch.loss_mask).sum().backward()
    # Megatron computes the loss in 32 bits whatever the model's precision is.
    torch.testing.assert_close(losses, theirs, rtol=2e-6, atol=2e-6, check_dtype=False)
    found = dict(stage.named_parameters())
    compared = 0
    for name, parameter in other.named_parameters():
        if parameter.grad is not None and "neck" not in name:
            gradient = parameter.grad
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[name].grad, gradient, rtol=0, atol=2e-6 * scale)
            compared += 1
    assert compared == 4 * 6 + 1
