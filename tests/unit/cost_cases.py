"""Shapes for the tests of costs, small enough to count by hand."""

import math
from pathlib import Path
from typing import Any

from megatron_dip.costs import ItemSize, ModuleShape, Parallelism
from megatron_dip.costs.analytic import AnalyticTimes
from megatron_dip.costs.devices import Device, device_preset

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vlm_s", "vlm_m", "vlm_l", "t2v_s", "t2v_l")
GPUS = {"vlm_s": 16, "t2v_s": 16, "vlm_m": 32, "vlm_l": 64, "t2v_l": 64}
"""Of one replica, by model."""


def stand_in(name: str) -> Path:
    """The file of the model that ``benchmarks/problems`` are of."""
    own = ROOT / "benchmarks" / "problems" / "models" / f"{name}.yaml"
    return own if own.exists() else ROOT / "configs" / "models" / f"{name}.yaml"


def vit(**fields: Any) -> ModuleShape:
    """Hidden 8, FFN 32: linear layers of 4 x 64 + 2 x 256 = 768 weights."""
    return ModuleShape(
        **{
            "name": "vision",
            "kind": "vit",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 32,
            "num_attention_heads": 4,
            "patch_values": 12,
        }
        | fields
    )


def causal(**fields: Any) -> ModuleShape:
    """Hidden 8, keys and values of 4, FFN 16: 2 x 64 + 2 x 32 + 3 x 128 = 576 weights."""
    return ModuleShape(
        **{
            "name": "language",
            "kind": "causal",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 16,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 64,
        }
        | fields
    )


def dit(**fields: Any) -> ModuleShape:
    """Hidden 8, FFN 32: 8 x 64 + 2 x 256 = 1024 weights."""
    return ModuleShape(
        **{
            "name": "dit",
            "kind": "dit",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 32,
            "num_attention_heads": 4,
            "patch_values": 16,
            "context_size": 8,
        }
        | fields
    )


def item(*spans: int, context: int = 0, **fields: Any) -> ItemSize:
    return ItemSize(tokens=sum(spans), spans=spans, context_tokens=context, **fields)


def times(
    device: Device | None = None, link_bytes_per_us: float = math.inf, **parallel: Any
) -> AnalyticTimes:
    return AnalyticTimes(
        device=device or device_preset("H100"),
        parallel=Parallelism(**parallel),
        tensor_link_bytes_per_us=link_bytes_per_us,
        ring_link_bytes_per_us=link_bytes_per_us,
    )


def plain_device() -> Device:
    """One operation per microsecond; nothing else takes time."""
    return Device(
        name="plain",
        peak_flops_per_us=1.0,
        memory_bytes=10**9,
        memory_bytes_per_us=math.inf,
        nvlink_bytes_per_us=math.inf,
        network_bytes_per_us=math.inf,
        best_efficiency=1.0,
        half_rate_flops=0.0,
        layer_overhead_us=0.0,
        collective_latency_us=0.0,
    )
