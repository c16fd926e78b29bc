"""What stages keep for their backward, beside what the cost model says; see ``test_kept_memory``.

Usage: ``megatron_dip.launch --cpu kept_memory_worker.py CASES RESULTS``.  CASES is a JSON file of
``{name: [configuration, {field of Megatron's configuration: value}]}``; RESULTS gets for each name
``{module: {place: {"held", "predicted", "moved", "layers"}}}`` in bytes, the places being first,
middle and last; moved to the host when all layers are offloaded, of what layers are predicted to
keep.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.costs import ItemSize, Parallelism
from megatron_dip.costs.memory import MemoryModel
from megatron_dip.families.configs import load_config
from megatron_dip.families.registry import family_of
from megatron_dip.integration.kernels import kernels_of
from megatron_dip.models.offload import offloaded_layers
from megatron_dip.runtime.measure import StoredBytes
from megatron_dip.runtime.offload import OffloadedLayers, Offloader

NUM_TOKENS = 96
SPANS = (64, 32)
NUM_LAYERS = 2


def base_config(fields, tensor):
    """What Megatron would make of a run's arguments on a CPU."""
    dtype = torch.bfloat16 if fields.get("bf16") else torch.float32
    defaults = {
        "num_layers": 1,
        "hidden_size": 8 * tensor,
        "num_attention_heads": tensor,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": tensor,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**defaults | fields)


class Bench:
    """Stages of one module under one configuration of Megatron."""

    def __init__(self, config, base, shape):
        self.shape, self.dtype = shape, base.params_dtype
        family = family_of(config)
        self.model = config.model_shape()
        self.end = self.model.first_with_backward()[shape.name]
        self.factory = family.stage_factory(config, base, 1)
        self.memory = MemoryModel(
            parallel=Parallelism(
                tensor=base.tensor_model_parallel_size, sequence_parallel=base.sequence_parallel
            ),
            kernels=kernels_of(base, on_cpu=True),
            layers_per_stage={shape.name: NUM_LAYERS},
        )
        self.num_text_rows = family.measured_upstream_tokens(config, shape.name)
        self.data = family.measured_data(config, shape.name, NUM_TOKENS)
        spans = (NUM_TOKENS,)
        if shape.is_clip:
            spans = (config.model.vision.rows_per_image,)
        elif shape.adapter is not None:
            spans = self.data.span_lengths
        elif shape.kind == "causal":
            spans = SPANS
            self.data = replace(self.data, span_lengths=spans)
        self.size = ItemSize(tokens=sum(spans), spans=spans, context_tokens=self.num_text_rows)

    def places(self):
        """By place, what is held, predicted and moved."""
        last = self.shape.num_layers - NUM_LAYERS
        stages = {
            "first": (0, {"first": True, "last": False}),
            "middle": (0, {"first": False, "last": False}),
            "last": (last, {"first": False, "last": True}),
        }
        if not self.shape.trains_any:
            # Rows of the first stage need no gradient until something from upstream comes in:
            # images, which this batch has none of, or cross-attention, in the first layer.
            del stages["first"]
        return {
            place: self.measured(first_layer, ends) | self.predicted(first_layer, ends)
            for place, (first_layer, ends) in stages.items()
            if ends["last"] or self.end < first_layer + NUM_LAYERS
        }

    def predicted(self, first_layer, ends):
        parts = [
            name for name, holds in ends.items() if holds and (name == "last" or self.end <= 0)
        ]
        is_entered = self.end < self.shape.num_layers
        extras = [
            self.memory.stored_bytes(self.shape, self.size, f"{p}_extra", is_entered=is_entered)
            for p in parts
        ]
        num_layers = min(NUM_LAYERS, max(0, first_layer + NUM_LAYERS - self.end))
        layers = num_layers * self.memory.activation_bytes(self.shape, self.size)
        return {"predicted": layers + sum(extras), "layers": layers}

    def measured(self, first_layer, ends):
        """What a forward of a stage leaves, and how much of it goes to the host."""
        stage = self.factory.build(
            self.shape.name, first_layer=first_layer, num_layers=NUM_LAYERS, **ends
        )
        stage.to(self.dtype).train()
        counter = StoredBytes(stage.parameters())
        needs_grad = self.end < max(first_layer, 1)
        hidden, upstream = self.inputs(is_first=ends["first"], needs_grad=needs_grad)
        offloader = Offloader(torch.device("cpu"), block_bytes=4096)
        offloader.most_bytes = 2**30
        layers = range(max(first_layer, self.end), first_layer + NUM_LAYERS)
        offload = OffloadedLayers(offloader, tuple(layers))
        offload.stored = counter
        with offloaded_layers(stage, offload), counter.counting():
            output = stage(hidden, self.data, upstream)
        held = counter.held
        offload.copy_out(tensor for tensor in (hidden, upstream) if tensor is not None)
        offload.release()
        assert counter.held == held - offloader.moved_bytes
        del output
        return {"held": held, "moved": offloader.moved_bytes}

    def inputs(self, *, is_first, needs_grad):
        if not is_first:
            rows = self.factory.boundary(self.shape.name, outer=False).shape(
                [self.size], outer=False
            )
            return self.random(rows, needs_grad=needs_grad), None
        if not self.num_text_rows:
            return None, None
        above = self.shape.upstream[0]
        text = ItemSize(tokens=self.num_text_rows, spans=(self.num_text_rows,))
        # Stages get whole rows, also where these cross in parts.
        whole = self.factory.boundary(above, outer=True)._replace(num_shards=1)
        rows = whole.shape([text], outer=True)
        needs_grad = above in self.model.modules_with_backward()
        return None, self.random(rows, needs_grad=needs_grad)

    def random(self, rows, *, needs_grad):
        # A leaf as it stands may be changed in place by the stage's first layer.
        return torch.randn(rows, dtype=self.dtype).requires_grad_(needs_grad) * 1


def main():
    torch.distributed.init_process_group("gloo")
    tensor = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    model_parallel_cuda_manual_seed(1)
    results = {}
    for name, (path, fields) in json.loads(Path(sys.argv[1]).read_text()).items():
        config, base = load_config(path), base_config(fields, tensor)
        model = config.model_shape()
        results[name] = {
            shape.name: Bench(config, base, shape).places()
            for shape in model.modules
            if shape.name in model.modules_with_backward()
        }
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
