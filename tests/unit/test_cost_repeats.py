"""The time of what Megatron recomputes, on a device of one operation per microsecond."""

from dataclasses import replace
from typing import Any

import pytest
from cost_cases import causal, item, plain_device, times

from megatron_dip.costs import Kernels
from megatron_dip.costs.layers import layer_operations

SIZE = item(6, 4)


def repeated_us(module: Any, layers_per_stage: float = 4.0, **flags: Any) -> float:
    """What the flags add to the input gradient of one item in one layer."""
    plain = times(plain_device())
    repeating = replace(
        plain, kernels=Kernels(**flags), layers_per_stage={"language": layers_per_stage}
    )
    before, after = plain.layer(module, SIZE), repeating.layer(module, SIZE)
    assert (before.forward_us, before.weight_grad_us) == (after.forward_us, after.weight_grad_us)
    return after.input_grad_us - before.input_grad_us


def forward_us(module: Any, *names: str) -> float:
    plain = times(plain_device())
    operations = layer_operations(module, SIZE, plain.parallel, plain.bytes_per_value)
    found = [one.forward_flops for one in operations if not names or one.name in names]
    assert len(found) >= len(names)
    return sum(found)


def test_full_recomputation_repeats_the_forward_of_as_many_layers_as_it_names() -> None:
    whole = forward_us(causal())
    assert repeated_us(causal()) == 0.0
    full: dict[str, Any] = {"recompute": "full", "recompute_num_layers": 3}
    assert repeated_us(causal(), recompute_method="uniform", **full) == pytest.approx(whole)
    block = {"recompute_method": "block", **full}
    assert repeated_us(causal(), **block) == pytest.approx(0.75 * whole)
    assert repeated_us(causal(), 2.0, **block) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("part", "names"),
    [("core_attn", ("attention",)), ("mlp", ("mlp_in", "mlp_out"))],
    ids=["core_attn", "mlp"],
)
def test_selective_recomputation_repeats_its_parts(part: str, names: tuple[str, ...]) -> None:
    flags: dict[str, Any] = {"recompute": "selective", "recomputed_parts": {part}}
    assert repeated_us(causal(), **flags) == pytest.approx(forward_us(causal(), *names))
