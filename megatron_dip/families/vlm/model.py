"""Vision-language models: a vision tower, and a language backbone that reads its features.

Under Megatron's own schedule a rank holds what that wants: the whole vision tower with the first
language layers on the first rank, and a run of language layers on every other.
"""

from functools import partial
from math import isqrt
from typing import Unpack

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.families.base import ModelFamily, SetLengths, StageFactory
from megatron_dip.families.common import (
    check_vocabulary,
    make_backbone_config,
    shared_index,
    skips_bad_samples,
    stop_unneeded_dropout,
)
from megatron_dip.families.data.images import Grid
from megatron_dip.families.data.index import build_index, load_index, split_source
from megatron_dip.families.data.packing import PackingOptions
from megatron_dip.families.data.sources import DataSettings, open_source
from megatron_dip.families.forms import VisionConfig
from megatron_dip.families.omni.config import OmniConfig
from megatron_dip.families.packed.configs import make_projection_config, make_vision_config
from megatron_dip.families.packed.language import LanguageStage
from megatron_dip.families.packed.media import decodes_media
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.families.packed.vision import VisionStage
from megatron_dip.families.vlm.batches import LanguageBatch, VisionBatch
from megatron_dip.families.vlm.config import VlmConfig
from megatron_dip.families.vlm.dataset import Division, VlmDataset

__all__ = ["VlmFamily", "VlmStages", "division_of_run", "measured_image", "measured_sequence"]


class VlmStages(StageFactory):
    """Stages of the vision tower and of the language backbone."""

    def __init__(self, config: VlmConfig | OmniConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, seed)
        vision, language = config.model.vision, config.model.language
        self._model = config.model
        self.language_config = make_backbone_config(base, language, language.experts)
        self._vision_config = make_vision_config(
            base,
            norm_epsilon=vision.norm_epsilon,
            has_rotary=vision.positions == "rotary_2d",
            **vision.sizes(),
        )
        stop_unneeded_dropout(language, self.language_config)
        stop_unneeded_dropout(vision, self._vision_config)
        self._projection_config = make_projection_config(
            base, hidden_size=language.hidden_size, ffn_hidden_size=4 * vision.hidden_size
        )

    @property
    def loss_config(self) -> TransformerConfig:
        """That of the language module."""
        return self.language_config

    def construct(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """See :class:`StageFactory`."""
        if module == "vision":
            vision = self._model.vision
            return VisionStage(
                self._vision_config,
                self._projection_config,
                patch_size=vision.patch_size,
                merge_size=vision.merge_size,
                position_table_side=vision.position_table_side,
                **layers,
            )
        language = self._model.language
        return LanguageStage(
            self.language_config,
            vocab_size=language.vocab_size,
            max_sequence_length=language.seq_length,
            rotary_base=language.rotary_base,
            **layers,
        )


def measured_image(num_patches: int, vision: VisionConfig) -> VisionBatch:
    """One image without meaning, near to a square."""
    merge = vision.merge_size
    groups = num_patches // merge**2
    rows = max(n for n in range(1, isqrt(groups) + 1) if groups % n == 0)
    return VisionBatch(
        patches=torch.zeros(num_patches, 3 * vision.patch_size**2),
        grids=(Grid(merge * rows, merge * groups // rows, merge),),
        items=(0,),
    )


def measured_sequence(num_tokens: int) -> LanguageBatch:
    """One sequence of one span without images."""
    zeros = torch.zeros(num_tokens, dtype=torch.int64)
    return LanguageBatch(
        tokens=zeros,
        labels=zeros,
        position_ids=torch.arange(num_tokens),
        loss_mask=torch.ones(num_tokens),
        span_lengths=(num_tokens,),
        image_rows=torch.zeros(0, dtype=torch.int64),
        images=(),
        items=(0,),
    )


class VlmFamily(ModelFamily[VlmConfig]):
    """Vision-language models over image-text data."""

    def stage_factory(self, config: VlmConfig, base: TransformerConfig, seed: int) -> VlmStages:
        """See :class:`ModelFamily`."""
        return VlmStages(config, base, seed)

    def item_tokens(self, config: VlmConfig, module: str) -> range:
        """Patches of an image, in groups that are merged; tokens of a sequence."""
        if module == "vision":
            group = config.model.vision.patches_per_token
            return range(group, group * config.data.max_image_tokens + 1, group)
        return range(1, config.model.language.seq_length + 1)

    def measured_data(
        self, config: VlmConfig, module: str, num_tokens: int
    ) -> VisionBatch | LanguageBatch:
        """One image, near to a square, or one sequence without images."""
        if module == "vision":
            return measured_image(num_tokens, config.model.vision)
        return measured_sequence(num_tokens)

    def data_sets(
        self, config: VlmConfig, lengths: SetLengths
    ) -> tuple[VlmDataset | None, VlmDataset | None]:
        """Packed sequences; only ranks that hold the first vision stage decode images."""
        args = get_args()
        settings = _settings(config)
        index = shared_index(settings, config.data, build_index, load_index)
        check_vocabulary(config.data, config.model.language.vocab_size)
        source = open_source(settings)
        train, valid = split_source(
            source, config.data.valid_share, args.seed, needs_valid=lengths.needs_valid
        )
        make = partial(
            VlmDataset,
            settings,
            index,
            source=source,
            seed=args.seed,
            decode_images=decodes_media(),
            skip_bad_samples=skips_bad_samples(config.data),
            packing=PackingOptions(separation=config.data.separation),
            division=division_of_run(args.sequence_parallel),
        )
        return (
            make(num_samples=lengths.train, subset=train) if lengths.needs_train else None,
            make(num_samples=lengths.valid, subset=valid) if lengths.needs_valid else None,
        )


def division_of_run(sequence_parallel: bool) -> Division:
    """Two chunks of every sample for each context-parallel rank, as Transformer Engine has it, and
    their rows divided among the tensor-parallel ranks."""
    num_ranks = mpu.get_context_parallel_world_size()
    shards = mpu.get_tensor_model_parallel_world_size() if sequence_parallel else 1
    return Division(
        rank=mpu.get_context_parallel_rank(),
        num_ranks=num_ranks,
        multiple=2 * num_ranks * shards,
    )


def _settings(config: VlmConfig) -> DataSettings:
    return DataSettings(
        format=config.data.format,
        samples=config.data.path,
        image_folder=config.data.image_folder,
        tokenizer=config.data.tokenizer,
        text_form=config.data.text_form(),
        seq_length=config.model.language.seq_length,
        patch_size=config.model.vision.patch_size,
        merge_size=config.model.vision.merge_size,
        min_image_tokens=config.data.min_image_tokens,
        max_image_tokens=config.data.max_image_tokens,
    )
