"""Layers of VLM-S's sizes in plain torch, bf16, against the analytic model of costs."""

import time
from collections.abc import Callable

import torch
from check_results import ROOT, part_arguments, report
from torch import nn
from torch.nn import functional

from megatron_dip.costs import ItemSize, cluster_builder, load_model
from megatron_dip.costs.analytic import LayerTimes
from megatron_dip.costs.machine import ClusterConfig
from megatron_dip.costs.shapes import ModuleShape

_TOKENS = (1024, 4096, 8192)
_SMALL = (16, 32)
_REPEATS = 5


class Layer(nn.Module):
    """A transformer's layer with the sizes of a module's shape; [tokens, hidden] to the same."""

    def __init__(self, shape: ModuleShape, divide: int) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size // divide, shape.ffn_hidden_size // divide
        self.heads, self.groups = shape.num_attention_heads, shape.query_groups
        self.size = hidden // self.heads
        self.is_causal, self.is_gated = shape.kind == "causal", shape.is_gated
        width = (self.heads + 2 * self.groups) * self.size
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv = nn.Linear(hidden, width)
        self.out = nn.Linear(self.heads * self.size, hidden)
        self.up = nn.Linear(hidden, (2 if self.is_gated else 1) * inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """One sequence."""
        parts = (self.heads * self.size, self.groups * self.size, self.groups * self.size)
        query, key, value = (
            part.view(1, len(rows), -1, self.size).transpose(1, 2)
            for part in self.qkv(self.norms[0](rows)).split(parts, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.is_causal, enable_gqa=self.groups != self.heads
        )
        rows = rows + self.out(mixed.transpose(1, 2).reshape(len(rows), -1))
        inner = self.up(self.norms[1](rows))
        if self.is_gated:
            gate, inner = inner.chunk(2, dim=-1)
            return rows + self.down(functional.silu(gate) * inner)
        return rows + self.down(functional.gelu(inner))


def main() -> None:
    """Run the part."""
    parser = part_arguments(__doc__)
    parser.add_argument("--gpu", default="H200", help="preset that the model is asked for")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    model = load_model(ROOT / "configs" / "models" / "vlm_s.yaml")
    cluster = ClusterConfig(name="one", gpu=options.gpu, num_gpus=1, pipeline_parallel=1)
    times = cluster_builder(model, cluster).times
    divide = 1 if on_gpu else 16
    found: dict[str, object] = {"preset": options.gpu, "sizes divided by": divide}
    for shape in model.modules:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        layer = Layer(shape, divide).to(options.device, dtype)
        for tokens in _TOKENS if on_gpu else _SMALL:
            rows = torch.randn(tokens, shape.hidden_size // divide, dtype=dtype)
            rows = rows.to(options.device).requires_grad_()
            forward_us, backward_us = _measured(layer, rows)
            here = {"forward us": forward_us, "backward us": backward_us}
            if on_gpu:
                here |= _against(here, times, shape, ItemSize(tokens=tokens, spans=(tokens,)))
            found[f"{shape.name}, {tokens} tokens"] = here
    report(options.results, "layers", options.device, found)


def _against(
    here: dict[str, float], times: LayerTimes, shape: ModuleShape, size: ItemSize
) -> dict[str, float]:
    """What the model says of the same call, and how many times that it took."""
    asked, overhead_us = times.layer(shape, size), times.overhead_us(shape)
    stated = {
        "forward us": asked.forward_us + overhead_us,
        "backward us": asked.input_grad_us + asked.weight_grad_us + overhead_us,
    }
    return {
        **{f"model, {name}": value for name, value in stated.items()},
        **{f"{name} over model": here[name] / value for name, value in stated.items()},
    }


def _measured(layer: Layer, rows: torch.Tensor) -> tuple[float, float]:
    """Medians of forward and backward, in microseconds."""
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(_REPEATS + 2):
        output: list[torch.Tensor] = []
        forward.append(_timed(lambda: output.append(layer(rows)), rows.is_cuda))  # noqa: B023
        loss = output[0].float().square().mean()
        backward.append(_timed(loss.backward, rows.is_cuda))
        layer.zero_grad()
    return _median(forward[2:]), _median(backward[2:])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _timed(work: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3


if __name__ == "__main__":
    main()
