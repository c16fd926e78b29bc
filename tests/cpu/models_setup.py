"""What the tests of ``models`` share: Megatron-Core on CPU without its training loop, and batches.

Megatron asks for the current CUDA device and its generator in a few places that CPU tensors pass
through; ``megatron_on_cpu`` answers those.  It undoes everything, so that tests which need another
set-up can run in the same process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from launching import free_port
from megatron.core import parallel_state
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.data.images import Grid
from megatron_dip.families.packed.configs import (
    make_language_config,
    make_projection_config,
    make_vision_config,
)
from megatron_dip.families.packed.initialization import initialize_parameters
from megatron_dip.families.packed.language import LanguageStage
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.families.packed.vision import VisionStage
from megatron_dip.families.vlm.batches import LanguageBatch, VisionBatch
from megatron_dip.models.recompute import recomputed_layers

VISION_LAYERS = 3
LANGUAGE_LAYERS = 4
VISION_HIDDEN = 32
LANGUAGE_HIDDEN = 48
PATCH_SIZE = 2
VOCAB_SIZE = 64
IMAGE_TOKEN = 1
SEED = 7


class Tower(NamedTuple):
    """What differs between vision towers."""

    merge_size: int
    table_side: int | None
    """None: rotary positions."""


TABLE = Tower(2, 5)
ROTARY = Tower(3, None)


@contextmanager
def megatron_on_cpu(tensor_parallel: int = 1) -> Iterator[None]:
    """Megatron's process groups over gloo; one process unless ``RANK`` and so on are set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        for name in ("get_rng_state", "_get_cuda_rng_state"):
            owner = torch.cuda if name == "get_rng_state" else megatron_random
            patch.setattr(owner, name, lambda *args, **kwargs: torch.zeros(1, dtype=torch.uint8))
        patch.setattr(megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None)
        patch.setattr(torch.cuda, "manual_seed", lambda seed: None)
        patch.setattr(fused_softmax, "get_default_causal_mask", _causal_mask)
        patch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
        _start_process_group()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", 1)
        try:
            yield
        finally:
            tracker.reset()
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _causal_mask(num_tokens: int) -> Tensor:
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(diagonal=1)


def _start_process_group() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    port = os.environ.get("MASTER_PORT") or str(free_port())
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://localhost:{port}",
        rank=int(os.environ.get("RANK", "0")),
        world_size=world_size,
    )


def base_config(
    dtype: torch.dtype = torch.float64, *, tensor_parallel: int = 1, sequence_parallel: bool = False
) -> TransformerConfig:
    """What Megatron would make of a run's arguments."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=8 * tensor_parallel,
        num_attention_heads=tensor_parallel,
        params_dtype=dtype,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        # Wider than usual, so that small models have gradients well above rounding.
        init_method_std=0.1,
        layernorm_epsilon=1e-6,
    )


def vision_stages(
    base: TransformerConfig, cuts: Sequence[int] = (), tower: Tower = TABLE
) -> list[VisionStage]:
    """The vision tower, cut before each of the layers ``cuts``."""
    config = make_vision_config(
        base,
        num_layers=VISION_LAYERS,
        hidden_size=VISION_HIDDEN,
        ffn_hidden_size=64,
        num_attention_heads=4,
        has_rotary=tower.table_side is None,
    )
    projection = make_projection_config(base, hidden_size=LANGUAGE_HIDDEN, ffn_hidden_size=64)
    return [
        _ready(
            VisionStage(
                config,
                projection,
                patch_size=PATCH_SIZE,
                merge_size=tower.merge_size,
                position_table_side=tower.table_side,
                **layers,
            ),
            base,
        )
        for layers in layers_of(cuts, VISION_LAYERS)
    ]


def language_stages(
    base: TransformerConfig, cuts: Sequence[int] = (), *, tie_embeddings: bool = False
) -> list[LanguageStage]:
    """The language backbone, cut before each of the layers ``cuts``."""
    config = make_language_config(
        base,
        num_layers=LANGUAGE_LAYERS,
        hidden_size=LANGUAGE_HIDDEN,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
    )
    return [
        _ready(
            LanguageStage(
                config,
                vocab_size=VOCAB_SIZE,
                max_sequence_length=64,
                tie_embeddings=tie_embeddings,
                **layers,
            ),
            base,
        )
        for layers in layers_of(cuts, LANGUAGE_LAYERS)
    ]


def layers_of(cuts: Sequence[int], num_layers: int) -> list[StageLayers]:
    """The stages of a module of ``num_layers`` that is cut before each of the layers ``cuts``."""
    return [
        StageLayers(
            first_layer=start,
            num_layers=end - start,
            first=index == 0,
            last=index == len(cuts),
        )
        for index, (start, end) in enumerate(pairwise([0, *cuts, num_layers]))
    ]


def _ready[Stage: StageModule](stage: Stage, base: TransformerConfig) -> Stage:
    # Norms are made in torch's default dtype.
    stage.to(base.params_dtype)
    initialize_parameters(stage, SEED)
    # Constant initial values would hide a wrong order of heads, biases or norm weights.
    for name, parameter in stage.named_parameters():
        if parameter.dim() == 1 and not getattr(parameter, "tensor_model_parallel", False):
            wave = torch.arange(parameter.numel(), dtype=torch.float64) + len(name.split(".")[-1])
            parameter.data.add_(0.1 * torch.cos(wave).to(parameter.dtype))
    return stage


def vision_batch(tower: Tower = TABLE, *, seed: int = 0) -> VisionBatch:
    """Random pixels of images of 2, 4, 4 and 3 groups; they depend on an image's place and
    ``seed`` only."""
    side = tower.merge_size
    grids = [Grid(side * m, side * n, side) for m, n in ((1, 2), (2, 2), (2, 2), (3, 1))]
    pixels = []
    for index, grid in enumerate(grids):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        pixels.append(torch.randn(grid.num_patches, 3 * PATCH_SIZE**2, generator=generator))
    return VisionBatch(
        patches=torch.cat(pixels), grids=tuple(grids), items=tuple(range(len(grids)))
    )


def language_batch(
    span_lengths: Sequence[int] = (9, 7, 7, 16),
    images: Sequence[tuple[int, int]] = ((1, 2), (10, 4), (20, 4), (30, 3)),
    seed: int = 0,
) -> LanguageBatch:
    """Random tokens; ``images`` are (first row, number of rows) of each image."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(span_lengths)
    tokens = torch.randint(2, VOCAB_SIZE, (num_tokens,), generator=generator)
    rows = [row for start, count in images for row in range(start, start + count)]
    image_rows = torch.tensor(rows, dtype=torch.int64)
    tokens[image_rows] = IMAGE_TOKEN
    loss_mask = torch.ones(num_tokens)
    loss_mask[image_rows] = 0.0
    return LanguageBatch(
        tokens=tokens,
        labels=torch.roll(tokens, -1),
        position_ids=torch.cat([torch.arange(length) for length in span_lengths]),
        loss_mask=loss_mask,
        span_lengths=tuple(span_lengths),
        image_rows=image_rows,
        images=tuple(range(len(images))),
        items=(0,),
    )


def run_chain(
    stages: Sequence[StageModule],
    batch: VisionBatch | LanguageBatch,
    upstream: Tensor | None = None,
    recompute_layers: Sequence[int] = (),
) -> Tensor:
    """The output of the last stage; every stage gets only its own recomputed layers."""
    hidden: Tensor | None = None
    for stage in stages:
        layout = stage.config.pipeline_model_parallel_layout
        held = range(layout.first_layer, layout.first_layer + layout.get_num_layers_to_build())
        mine = [layer for layer in recompute_layers if layer in held]
        with recomputed_layers(stage, mine):
            hidden = stage(hidden, batch, upstream if stage.pre_process else None)
    assert hidden is not None
    return hidden
