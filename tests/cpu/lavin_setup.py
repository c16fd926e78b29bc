"""Small LaVIN towers and batches for the tests of ``models.lavin``, in 64 bits unless asked."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from models_setup import base_config, layers_of, run_chain

from megatron_dip.families.lavin.adapter import AdapterOptions
from megatron_dip.families.lavin.batches import ImageSize, LavinMicrobatch, RoutedSequence
from megatron_dip.families.lavin.language import LavinLanguageStage
from megatron_dip.families.lavin.stages import freeze_towers, is_adapter
from megatron_dip.families.lavin.vision import ClipStage, GateMode, make_clip_config
from megatron_dip.families.packed.configs import make_language_config
from megatron_dip.families.packed.initialization import (
    initialize_parameters,
    named_global_parameters,
)
from megatron_dip.families.packed.stage import StageModule

__all__ = [
    "FEATURE_LAYERS",
    "LANGUAGE_LAYERS",
    "VISION_LAYERS",
    "clip_stages",
    "gradients",
    "language_stages",
    "loss_of",
    "microbatch",
    "move_adapters",
    "published_stages",
    "sample",
    "step",
]

VISION_LAYERS, LANGUAGE_LAYERS = 4, 4
FEATURE_LAYERS = (2, 3, 4)
PATCH_SIZE, IMAGE_SIZE = 2, 6
SIZE = ImageSize(num_patches=9, values_per_patch=12, num_features=len(FEATURE_LAYERS))
VOCAB_SIZE = 64
SEED = 11
OPTIONS = AdapterOptions(temperature=5.0, dropout=0.0)


def clip_stages(
    base: TransformerConfig, cuts: Sequence[int] = (), *, gates: GateMode = "token"
) -> list[ClipStage]:
    """The vision tower, cut before each of the layers ``cuts``."""
    config = make_clip_config(
        base,
        num_layers=VISION_LAYERS,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
    )
    return [
        _ready(
            ClipStage(
                config,
                patch_size=PATCH_SIZE,
                image_size=IMAGE_SIZE,
                feature_layers=FEATURE_LAYERS,
                adapter=OPTIONS,
                gates=gates,
                **layers,
            ),
            base,
        )
        for layers in layers_of(cuts, VISION_LAYERS)
    ]


def language_stages(base: TransformerConfig, cuts: Sequence[int] = ()) -> list[LavinLanguageStage]:
    """The language tower, cut before each of the layers ``cuts``."""
    config = make_language_config(
        base,
        num_layers=LANGUAGE_LAYERS,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=4,
    )
    return [
        _ready(
            LavinLanguageStage(
                config,
                adapter=OPTIONS,
                feature_size=32,
                neck_size=16,
                vocab_size=VOCAB_SIZE,
                max_sequence_length=64,
                **layers,
            ),
            base,
        )
        for layers in layers_of(cuts, LANGUAGE_LAYERS)
    ]


def _ready[Stage: StageModule](stage: Stage, base: TransformerConfig) -> Stage:
    stage.to(base.params_dtype)
    initialize_parameters(stage, SEED)
    freeze_towers(stage)
    return stage


def published_stages(
    hidden_size: int, num_layers: int, ffn_hidden_size: int, num_attention_heads: int
) -> list[StageModule]:
    """Whole towers of a published size, on torch's meta device."""
    base = replace(base_config(torch.float32), perform_initialization=False)
    clip = make_clip_config(
        base, num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16
    )
    llama = make_language_config(
        base,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
    )
    with torch.device("meta"):
        vision = ClipStage(
            clip,
            first_layer=0,
            num_layers=24,
            first=True,
            last=True,
            patch_size=14,
            image_size=224,
            feature_layers=(4, 8, 12, 16, 20, 24),
            adapter=AdapterOptions(),
        )
        language = LavinLanguageStage(
            llama,
            adapter=AdapterOptions(),
            feature_size=1024,
            neck_size=128,
            first_layer=0,
            num_layers=num_layers,
            first=True,
            last=True,
            vocab_size=32000,
            max_sequence_length=512,
        )
    for stage in (vision, language):
        freeze_towers(stage)
    return [vision, language]


def move_adapters(stages: Sequence[StageModule]) -> None:
    """Away from their start, where they do nothing; the same whatever the cut is."""
    for stage in stages:
        for name, parameter in named_global_parameters(stage):
            if is_adapter(name):
                wave = torch.arange(parameter.numel(), dtype=torch.float64) + len(name)
                parameter.data.add_(0.2 * torch.cos(wave).view_as(parameter).to(parameter.dtype))


def sample(
    length: int, has_image: bool, seed: int, *, size: ImageSize = SIZE
) -> tuple[RoutedSequence, torch.Tensor]:
    """One sample as a sequence of its own; its content depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
    pixels = torch.randn(size.num_patches, size.values_per_patch, generator=generator)
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), words])
    image_rows = torch.arange(3, 3 + size.num_features) if has_image else torch.arange(0)
    weights = torch.zeros(length + 1)
    weights[-6:-1] = 1.0
    sequence = RoutedSequence(
        tokens=tokens,
        labels=torch.cat([tokens[1:], tokens[:1]]),
        weights=weights,
        num_loss_units=5,
        sample_lengths=(length,),
        modalities=(int(has_image),),
        image_rows=image_rows,
        images=(pixels,) if has_image else (),
        has_features=(True,) if has_image else (),
    )
    return sequence, pixels


def microbatch(
    lengths: Sequence[int] = (14, 11, 17, 12),
    with_image: Sequence[bool] = (True, False, True, True),
) -> LavinMicrobatch:
    """Samples of both kinds, one per sequence."""
    sequences = tuple(
        sample(length, image, 100 * length)[0]
        for length, image in zip(lengths, with_image, strict=True)
    )
    return LavinMicrobatch(sequences=sequences, image_size=SIZE)


def loss_of(
    vision: Sequence[StageModule],
    language: Sequence[StageModule],
    batch: LavinMicrobatch,
    recompute: Sequence[Sequence[int]] = ((), ()),
) -> torch.Tensor:
    """The weighted losses ``[T]`` of all sequences together."""
    features = None
    if batch.images:
        images = batch.clip_batch(range(len(batch.images)))
        features = run_chain(vision, images, recompute_layers=recompute[0])
        features = features.view(len(batch.images), SIZE.num_features, 1, -1)
        wanted = [item for items in batch.needs for item in items]
        features = features[wanted].flatten(0, 1)
    text = batch.sub_batch("language", range(len(batch.sequences)))
    losses = run_chain(language, text, features, recompute[1])
    return losses * text.loss_mask


def gradients(stages: Sequence[StageModule]) -> dict[str, torch.Tensor | None]:
    """Of all tuned parameters, by global name."""
    return {
        name: parameter.grad
        for stage in stages
        for name, parameter in named_global_parameters(stage)
        if parameter.requires_grad
    }


def step(
    base: TransformerConfig,
    batch: LavinMicrobatch,
    *,
    cuts: tuple[Sequence[int], Sequence[int]] = ((), ()),
    gates: GateMode = "token",
    moved: bool = True,
    recompute: Sequence[Sequence[int]] = ((), ()),
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Losses per row and the gradients of their sum."""
    vision = clip_stages(base, cuts[0], gates=gates)
    language = language_stages(base, cuts[1])
    stages = [*vision, *language]
    if moved:
        move_adapters(stages)
    losses = loss_of(vision, language, batch, recompute)
    losses.sum().backward()
    return losses.detach(), gradients(stages)
