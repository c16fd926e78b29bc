"""Models that see and hear: a vision tower and an audio encoder before one language backbone.

The stages of vision and language, and their configurations, are those of vision-language models.
"""

from functools import partial
from typing import Unpack

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.families.base import ModelFamily, SetLengths
from megatron_dip.families.common import (
    check_vocabulary,
    shared_index,
    skips_bad_samples,
    split_index,
    stop_unneeded_dropout,
)
from megatron_dip.families.data.images import ImageLimits
from megatron_dip.families.omni.audio import TOKENS_PER_ROW
from megatron_dip.families.omni.batches import AudioBatch
from megatron_dip.families.omni.config import OmniConfig
from megatron_dip.families.omni.data import (
    OmniDataset,
    OmniSettings,
    build_omni_index,
    load_omni_index,
)
from megatron_dip.families.omni.encoder import AudioStage
from megatron_dip.families.packed.configs import make_projection_config, make_vision_config
from megatron_dip.families.packed.media import decodes_media
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.families.vlm.batches import LanguageBatch, VisionBatch
from megatron_dip.families.vlm.model import (
    VlmStages,
    division_of_run,
    measured_image,
    measured_sequence,
)

__all__ = ["OmniFamily", "OmniStages"]


class OmniStages(VlmStages):
    """Stages of the three modules."""

    def __init__(self, config: OmniConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, base, seed)
        self._audio = audio = config.model.audio
        self._audio_config = make_vision_config(
            base, norm_epsilon=audio.norm_epsilon, **audio.sizes()
        )
        stop_unneeded_dropout(audio, self._audio_config)
        self._audio_projection = make_projection_config(
            base,
            hidden_size=config.model.language.hidden_size,
            ffn_hidden_size=4 * audio.hidden_size,
        )

    def construct(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """See :class:`StageFactory`."""
        if module != "audio":
            return super().construct(module, **layers)
        return AudioStage(
            self._audio_config,
            self._audio_projection,
            num_mels=self._audio.num_mels,
            **layers,
        )


class OmniFamily(ModelFamily[OmniConfig]):
    """Models that see and hear, over questions about images and sounds."""

    def stage_factory(self, config: OmniConfig, base: TransformerConfig, seed: int) -> OmniStages:
        """See :class:`ModelFamily`."""
        return OmniStages(config, base, seed)

    def item_tokens(self, config: OmniConfig, module: str) -> range:
        """Patches of an image or tokens of a clip, in groups that are merged; of a sequence."""
        if module == "language":
            return range(1, config.model.language.seq_length + 1)
        rows, group = config.model.language.seq_length, TOKENS_PER_ROW
        if module == "vision":
            rows = config.data.max_image_tokens
            group = config.model.vision.patches_per_token
        return range(group, group * rows + 1, group)

    def measured_data(
        self, config: OmniConfig, module: str, num_tokens: int
    ) -> VisionBatch | LanguageBatch | AudioBatch:
        """One image, one clip or one sequence without either."""
        if module == "vision":
            return measured_image(num_tokens, config.model.vision)
        if module == "language":
            return measured_sequence(num_tokens)
        mels = torch.zeros(2 * num_tokens, config.model.audio.num_mels)
        return AudioBatch(mels=mels, span_lengths=(num_tokens,), items=(0,))

    def data_sets(
        self, config: OmniConfig, lengths: SetLengths
    ) -> tuple[OmniDataset | None, OmniDataset | None]:
        """Sequences; only ranks that hold the encoders' first stages read pixels and sounds."""
        args, data = get_args(), config.data
        settings = OmniSettings(
            samples=data.path,
            media_folder=data.media_folder,
            tokenizer=data.tokenizer,
            text_form=data.text_form(),
            seq_length=config.model.language.seq_length,
            limits=ImageLimits(
                config.model.vision.patch_size,
                data.min_image_tokens,
                data.max_image_tokens,
                config.model.vision.merge_size,
            ),
            audio_rate=data.audio_rate,
            num_mels=config.model.audio.num_mels,
        )
        check_vocabulary(config.data, config.model.language.vocab_size)
        index = shared_index(settings, data, build_omni_index, load_omni_index)
        train, valid = split_index(index, data, lengths)
        make = partial(
            OmniDataset,
            settings,
            index,
            seed=args.seed,
            decode_media=decodes_media(),
            skip_bad_samples=skips_bad_samples(data),
            division=division_of_run(args.sequence_parallel),
        )
        return (
            make(num_samples=lengths.train, subset=train) if lengths.needs_train else None,
            make(num_samples=lengths.valid, subset=valid) if lengths.needs_valid else None,
        )
