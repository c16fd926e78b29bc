"""Text-to-video models: a text encoder, and a diffusion transformer that reads its features.

Under Megatron's own schedule a rank holds what that wants: the whole text encoder with the first
layers of the transformer on the first rank, and a run of its layers on every other.
"""

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Unpack

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.base import ModelFamily, SetLengths, StageFactory
from megatron_dip.families.common import (
    check_vocabulary,
    make_backbone_config,
    shared_index,
    skips_bad_samples,
    split_index,
    stop_unneeded_dropout,
)
from megatron_dip.families.packed.configs import make_dit_config
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.packed.shapes import ROWS_PER_CLIP
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.families.t2v.batches import DitBatch, TextBatch
from megatron_dip.families.t2v.clips import (
    ClipDataset,
    ClipSettings,
    build_clip_index,
    load_clip_index,
)
from megatron_dip.families.t2v.config import T2vConfig
from megatron_dip.families.t2v.dit import DitStage
from megatron_dip.families.t2v.text import TextStage
from megatron_dip.families.t2v.videos import ClipLimits

__all__ = ["PackedT2v", "T2vFamily", "T2vStages"]


class PackedT2v(PackedModel):
    """What a rank of Megatron's schedule hands on is padded to a fixed shape, and cut again."""

    def check_whole(self) -> None:
        """
        Raises:
            UnsupportedError: Sequence parallelism: text and time, which every rank needs whole,
                would not fit into Megatron's fixed shape.
        """
        if self.config.sequence_parallel:
            raise UnsupportedError(
                "--sequence-parallel does not work with this model under Megatron's own schedule: "
                "leave it out (it works with --dip-schedule)"
            )

    def check_handed_rows(self, multiple: int) -> None:
        """
        Raises:
            UnsupportedError: Always; how many rows a clip has differs.
        """
        raise UnsupportedError(
            "--fp8-format does not work with this model under Megatron's own schedule on several "
            "pipeline ranks, which fixes the rows that stages hand on: use --dip-schedule"
        )

    def num_rows(self, data: DitBatch) -> int:
        """Patches, text and time of the clips."""
        rows = sum(data.span_lengths) + sum(data.text_lengths)
        return rows + ROWS_PER_CLIP * len(data.grids)


class T2vStages(StageFactory):
    """Stages of the text encoder and of the diffusion transformer."""

    model_type = PackedT2v

    def __init__(self, config: T2vConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, seed)
        text, dit = config.model.text, config.model.dit
        self._model = config.model
        self._text_config = make_backbone_config(base, text)
        self.dit_config = make_dit_config(base, norm_epsilon=dit.norm_epsilon, **dit.sizes())
        stop_unneeded_dropout(text, self._text_config)
        stop_unneeded_dropout(dit, self.dit_config)

    @property
    def loss_config(self) -> TransformerConfig:
        """That of the diffusion transformer."""
        return self.dit_config

    def construct(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """See :class:`StageFactory`."""
        text = self._model.text
        if module == "text":
            return TextStage(
                self._text_config,
                vocab_size=text.vocab_size,
                max_sequence_length=text.seq_length,
                rotary_base=text.rotary_base,
                **layers,
            )
        return DitStage(
            self.dit_config,
            patch_values=self._model.dit.patch_values,
            text_size=text.hidden_size,
            **layers,
        )


class T2vFamily(ModelFamily[T2vConfig]):
    """Text-to-video models over video-text pairs."""

    def stage_factory(self, config: T2vConfig, base: TransformerConfig, seed: int) -> T2vStages:
        """See :class:`ModelFamily`."""
        return T2vStages(config, base, seed)

    def item_tokens(self, config: T2vConfig, module: str) -> range:
        """Tokens of a caption, patches of a clip."""
        if module == "text":
            return range(1, config.model.text.seq_length + 1)
        data = config.data
        fewest = min((prod(bucket) for bucket in data.buckets), default=data.min_frame_tokens)
        return range(fewest, data.most_clip_tokens + 1)

    def measured_data(
        self, config: T2vConfig, module: str, num_tokens: int
    ) -> TextBatch | DitBatch:
        """One caption, or one clip of a single row of patches with the longest caption."""
        if module == "text":
            return TextBatch(
                tokens=torch.zeros(num_tokens, dtype=torch.int64),
                position_ids=torch.arange(num_tokens),
                span_lengths=(num_tokens,),
                items=(0,),
            )
        patches = torch.zeros(num_tokens, config.model.dit.patch_values)
        return DitBatch(
            inputs=patches,
            targets=patches,
            times=torch.full((1,), 0.5),
            loss_mask=torch.ones(num_tokens),
            grids=((1, 1, num_tokens),),
            text_lengths=(config.model.text.seq_length,),
            items=(0,),
        )

    def measured_upstream_tokens(self, config: T2vConfig, module: str) -> int:
        """The caption of the clip."""
        return config.model.text.seq_length if module == "dit" else 0

    def data_sets(
        self, config: T2vConfig, lengths: SetLengths
    ) -> tuple[ClipDataset | None, ClipDataset | None]:
        """Clips with captions; only ranks that hold an end of the transformer read latents."""
        args = get_args()
        settings = _settings(config)
        check_vocabulary(config.data, config.model.text.vocab_size, "text")
        index = shared_index(settings, config.data, build_clip_index, load_clip_index)
        index = replace(index, settings=settings)
        train, valid = split_index(index, config.data, lengths)
        make: Any = partial(
            ClipDataset,
            index,
            seed=args.seed,
            load_latents=mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage(),
            skip_bad_samples=skips_bad_samples(config.data),
        )
        return (
            make(num_samples=lengths.train, subset=train, stage="train")
            if lengths.needs_train
            else None,
            make(num_samples=lengths.valid, subset=valid, stage="valid")
            if lengths.needs_valid
            else None,
        )


def _settings(config: T2vConfig) -> ClipSettings:
    data = config.data
    return ClipSettings(
        samples=data.path,
        video_folder=data.video_folder,
        tokenizer=data.tokenizer,
        text_form=data.text_form(),
        max_text_tokens=config.model.text.seq_length,
        latent_channels=config.model.dit.latent_channels,
        vae=data.vae,
        limits=ClipLimits(
            max_frames=data.max_frames,
            frame_stride=data.frame_stride,
            min_frame_tokens=data.min_frame_tokens,
            max_frame_tokens=data.max_frame_tokens,
            buckets=data.buckets,
        ),
    )
