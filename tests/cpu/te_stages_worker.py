"""Stages made of Transformer Engine's modules, as Megatron wraps them, beside local ones.

Usage: ``megatron_dip.launch --cpu te_stages_worker.py RECIPE...``, with the stand-in for
Transformer Engine on the path, on one rank or two with sequence parallelism.  A recipe is one of
fp8, or ``none``.  Every call of Megatron's wrappers has to bind, and outputs and gradients have to
be those of local layers, whole and cut.  Prints a line per recipe.
"""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ReduceOp
from transformer_engine.pytorch.attention import rope

from megatron_dip.costs import ItemSize
from megatron_dip.families.configs import load_config
from megatron_dip.families.packed.attention import SpanAttention
from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.families.registry import family_of
from megatron_dip.models.recompute import recomputed_layers

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = ("vlm", "omni", "t2v", "lavin")
LOCAL = (ColumnParallelLinear, RowParallelLinear, WrappedTorchNorm, SpanAttention)
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# No multiple of what any recipe wants.
NUM_TOKENS = 76
TOLERANCE = 1e-10


def base_config(implementation, **fields):
    """What Megatron would make of a run's arguments; fused positions where there is a kernel."""
    tensor = torch.distributed.get_world_size()
    defaults = {
        "num_layers": 1,
        "hidden_size": 8 * tensor,
        "num_attention_heads": tensor,
        "params_dtype": torch.float64,
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "use_cpu_initialization": True,
        "transformer_impl": implementation,
        "apply_rope_fusion": implementation == "transformer_engine",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "init_method_std": 0.1,
    }
    return TransformerConfig(**defaults | fields)


def config_of(family):
    """The tiny one; images of ``vlm`` have rotary positions, those of ``omni`` a table."""
    config = load_config(str(CONFIGS / f"{family}_tiny.yaml"))
    if family != "vlm":
        return config
    vision = config.model.vision.model_copy(update={"positions": "rotary_2d"})
    model = config.model.model_copy(update={"vision": vision})
    return config.model_copy(update={"model": model})


class Bench:
    """One module of a family under one configuration of Megatron, in one or two stages."""

    def __init__(self, family, module, base):
        self.config = config_of(family)
        self.family = family_of(self.config)
        self.factory = self.family.stage_factory(self.config, base, 1)
        self.base = base
        self.shape = self.config.model_shape().module(module)
        self.data = self.family.measured_data(self.config, module, NUM_TOKENS)
        if self.shape.kind == "causal" and self.shape.adapter is None:
            self.data = replace(self.data, span_lengths=(41, NUM_TOKENS - 41))

    def stages(self, cut=None):
        count = self.shape.num_layers
        bounds = [0, count] if cut is None else [0, cut, count]
        made = []
        for start, end in pairwise(bounds):
            stage = self.factory.build(
                self.shape.name,
                first_layer=start,
                num_layers=end - start,
                first=start == 0,
                last=end == count,
            )
            made.append(stage.to(torch.float64).train())
        return made

    def run(self, stages, recompute=()):
        """The last stage's output, and gradients by the names of local layers."""
        hidden, upstream = None, self.upstream()
        for stage in stages:
            layout = stage.config.pipeline_model_parallel_layout
            held = range(layout.first_layer, layout.first_layer + layout.get_num_layers_to_build())
            with recomputed_layers(stage, [layer for layer in recompute if layer in held]):
                hidden = stage(hidden, self.data, upstream if stage.pre_process else None)
            if not stage.post_process:
                spans = self.spans()
                context = 0 if upstream is None else len(upstream)
                size = ItemSize(tokens=sum(spans), spans=spans, context_tokens=context)
                expected = self.factory.boundary(self.shape.name, outer=False)
                assert tuple(hidden.shape) == expected.shape([size], outer=False)
        output = hidden
        weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view_as(output)
        if output.requires_grad:
            (output * weights).sum().backward()
        return output.detach(), dict(self.gradients(stages))

    def spans(self):
        if self.shape.is_clip:
            return (self.config.model.vision.rows_per_image,)
        return tuple(self.data.span_lengths)

    def gradients(self, stages):
        for stage in stages:
            for name, parameter in named_global_parameters(stage):
                for fused, local in FUSED_NORMS.items():
                    name = name.replace(fused, local)
                grad = parameter.grad
                if grad is not None and getattr(parameter, "sequence_parallel", False):
                    torch.distributed.all_reduce(
                        grad, ReduceOp.SUM, parallel_state.get_tensor_model_parallel_group()
                    )
                yield name, grad

    def upstream(self):
        rows = self.family.measured_upstream_tokens(self.config, self.shape.name)
        if not rows:
            return None
        above = self.shape.upstream[0]
        text = ItemSize(tokens=rows, spans=(rows,))
        # Stages get whole rows, also where these cross in parts.
        whole = self.factory.boundary(above, outer=True)._replace(num_shards=1)
        shape = whole.shape([text], outer=True)
        generator = torch.Generator(device="cpu").manual_seed(5)
        return torch.randn(shape, dtype=torch.float64, generator=generator)


def modules_of(family):
    return [m.name for m in load_config(str(CONFIGS / f"{family}_tiny.yaml")).model_shape().modules]


def assert_same(found, expected):
    output, gradients = found
    torch.testing.assert_close(output, expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert gradients.keys() == expected[1].keys(), gradients.keys() ^ expected[1].keys()
    for name, grad in expected[1].items():
        assert (grad is None) == (gradients[name] is None), name
        if grad is not None:
            scale = grad.abs().max().item()
            torch.testing.assert_close(
                gradients[name], grad, rtol=TOLERANCE, atol=TOLERANCE * scale, msg=name
            )


def local_layers_in(stages):
    """Names of what is not Transformer Engine's; the head of a vocabulary has no other class."""
    return [
        name
        for stage in stages
        for name, layer in stage.named_modules()
        if isinstance(layer, LOCAL) and not name.endswith("output_layer")
    ]


def check_families(change, expected):
    """``change``: of the configuration; ``expected``: what local layers give, by module."""
    for family in FAMILIES:
        for module in modules_of(family):
            bench = Bench(family, module, base_config("transformer_engine", **change))
            cut = max(1, bench.shape.num_layers // 2)
            stages = bench.stages(cut)
            assert not local_layers_in(stages), (family, module, local_layers_in(stages))
            rotated = len(rope.fused_calls)
            assert_same(bench.run(stages), expected[family, module])
            # One call for queries and one for keys of a layer; positions of clips are no sequence.
            is_fused = bench.shape.kind == "causal" or bench.shape.positions == "rotary_2d"
            num_calls = len(rope.fused_calls) - rotated
            assert num_calls == (2 * bench.shape.num_layers if is_fused else 0), module
            if change:
                stages, layers = bench.stages(), range(bench.shape.num_layers)
                assert_same(bench.run(stages, recompute=layers), expected[family, module])


def main():
    assert HAVE_TE
    torch.distributed.init_process_group("gloo")
    tensor = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(1)
    expected = {}
    for family in FAMILIES:
        for module in modules_of(family):
            bench = Bench(family, module, base_config("local"))
            expected[family, module] = bench.run(bench.stages())
    for recipe in sys.argv[1:]:
        change = {} if recipe == "none" else {"fp8": "hybrid", "fp8_recipe": recipe}
        check_families(change, expected)
        print(f"as local layers: {recipe}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
