"""Text-to-video models: a text encoder, and a diffusion transformer that reads its features.

Under Megatron's own schedule a rank holds what that wants: the whole text encoder with the first
layers of the transformer on the first rank, and a run of its layers on every other.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from megatron.training import get_args

from megatron_dip.config import T2vConfig
from megatron_dip.data import split_samples
from megatron_dip.data.clip_batches import DitBatch, TextBatch, WholeClips
from megatron_dip.data.clips import (
    ClipDataset,
    ClipSettings,
    build_clip_index,
    load_clip_index,
)
from megatron_dip.data.videos import ClipLimits
from megatron_dip.errors import UnsupportedError
from megatron_dip.integration.families.base import ModelFamily, StageFactory
from megatron_dip.integration.families.common import (
    StockModel,
    check_vocabulary,
    make_on_first_rank,
    row_rule,
)
from megatron_dip.models.configs import make_dit_config, make_language_config
from megatron_dip.models.dit import DitStage
from megatron_dip.models.shapes import ROWS_PER_CLIP
from megatron_dip.models.stage import StageModule, pad_rows
from megatron_dip.models.text import TextStage
from megatron_dip.runtime import BoundaryRules

__all__ = ["StockT2v", "T2vFamily", "T2vStages"]


class T2vStages(StageFactory):
    """Stages of the text encoder and of the diffusion transformer."""

    def __init__(self, config: T2vConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, seed)
        text, dit = config.model.text, config.model.dit
        self._model = config.model
        self._text_config = make_language_config(
            base,
            num_layers=text.num_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.ffn_hidden_size,
            num_attention_heads=text.num_attention_heads,
            num_query_groups=text.num_query_groups,
            qkv_bias=text.qkv_bias,
        )
        if not text.trainable:
            # Dropout regularises training: an encoder that is only used must not draw.
            self._text_config.hidden_dropout = self._text_config.attention_dropout = 0.0
        self.dit_config = make_dit_config(
            base,
            num_layers=dit.num_layers,
            hidden_size=dit.hidden_size,
            ffn_hidden_size=dit.ffn_hidden_size,
            num_attention_heads=dit.num_attention_heads,
        )

    @property
    def loss_config(self) -> TransformerConfig:
        """That of the diffusion transformer."""
        return self.dit_config

    def boundaries(self) -> BoundaryRules:
        """See ``megatron_dip.models.shapes``."""
        inner = partial(row_rule, self.dit_config)
        text, dit = self._model.text.hidden_size, self._model.dit.hidden_size
        return BoundaryRules(
            inner={
                "text": inner(text),
                "dit": inner(dit, carried="text", rows_per_item=ROWS_PER_CLIP),
            },
            # Every tensor-parallel rank holds all of the features' rows.
            outer={"text": inner(text, sharded=False)},
        )

    def construct(
        self, module: str, first_layer: int, num_layers: int, *, first: bool, last: bool
    ) -> TextStage | DitStage:
        """See :class:`StageFactory`."""
        text = self._model.text
        if module == "text":
            return TextStage(
                self._text_config,
                first_layer=first_layer,
                num_layers=num_layers,
                first=first,
                last=last,
                vocab_size=text.vocab_size,
                max_sequence_length=text.seq_length,
                rotary_base=text.rotary_base,
            )
        return DitStage(
            self.dit_config,
            first_layer=first_layer,
            num_layers=num_layers,
            first=first,
            last=last,
            patch_values=self._model.dit.patch_values,
            text_size=text.hidden_size,
        )

    def stock_model(self, *, pre_process: bool, post_process: bool, sequences: int) -> "StockT2v":
        """See :class:`StageFactory`.

        Raises:
            UnsupportedError: Sequence parallelism: text and time, which every rank needs whole,
                would not fit into Megatron's fixed shape.
        """
        if self.dit_config.sequence_parallel:
            raise UnsupportedError(
                "--sequence-parallel does not work with this model under Megatron's own schedule: "
                "leave it out (it works with --dip-schedule)"
            )
        return StockT2v(
            self,
            num_text_layers=self._model.text.num_layers,
            pre_process=pre_process,
            post_process=post_process,
            sequences=sequences,
        )


class StockT2v(StockModel):
    """What one rank holds under Megatron's own schedule.

    What a stage hands on is padded to the fixed shape [S, B, H], and cut to its rows again.
    """

    def __init__(
        self,
        factory: StageFactory,
        *,
        num_text_layers: int,
        pre_process: bool,
        post_process: bool,
        sequences: int,
    ) -> None:
        config = factory.loss_config
        super().__init__(config, pre_process=pre_process, post_process=post_process)
        self.text = (
            factory.build("text", 0, num_text_layers, first=True, last=True)
            if pre_process
            else None
        )
        self.dit = factory.build(
            "dit",
            get_transformer_layer_offset(config),
            get_num_layers_to_build(config),
            first=pre_process,
            last=post_process,
        )
        self.pg_collection = self.dit.pg_collection
        self._sequences = sequences
        self._seq_length: int = get_args().seq_length

    def forward(self, batch: WholeClips) -> torch.Tensor:
        """Hidden states [S, B, H], or losses [N] on the last rank."""
        hidden = features = None
        if self.text is not None:
            features = self.text(None, batch.text)
        else:
            assert self._input is not None
            num_rows = sum(batch.dit.span_lengths) + sum(batch.dit.text_lengths)
            num_rows += ROWS_PER_CLIP * len(batch.dit.grids)
            hidden = self._input.reshape(-1, 1, self._input.shape[-1])[:num_rows]
        output: torch.Tensor = self.dit(hidden, batch.dit, features)
        if self.post_process:
            return output
        padded = pad_rows(output, self._seq_length * self._sequences)
        shaped = padded.reshape(self._seq_length, self._sequences, -1)
        # Megatron frees outputs after sending them and refuses to free a view.
        viewless: torch.Tensor = make_viewless_tensor(
            shaped, requires_grad=shaped.requires_grad, keep_graph=True
        )
        return viewless

    def stages(self) -> list[StageModule]:
        """See :class:`StockModel`."""
        return [stage for stage in (self.text, self.dit) if stage is not None]


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
        self, config: T2vConfig, num_samples: Sequence[int]
    ) -> tuple[ClipDataset, ClipDataset | None]:
        """Clips with captions; only ranks that hold an end of the transformer read latents."""
        args = get_args()
        settings = _settings(config)
        check_vocabulary(settings.tokenizer, config.model.text.vocab_size, "text")
        folder = config.data.cache_folder or config.data.path.parent
        index = load_clip_index(
            make_on_first_rank(lambda: build_clip_index(settings, folder)[1], folder)
        )
        train, valid = split_samples(
            range(len(index.samples)), valid_share=config.data.valid_share, seed=args.seed
        )
        make: Any = partial(
            ClipDataset,
            index,
            seed=args.seed,
            load_latents=mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage(),
            skip_bad_samples=config.data.skip_bad_samples or args.skip_bad_samples,
        )
        return (
            make(num_samples=num_samples[0], subset=train, stage="train"),
            make(num_samples=num_samples[1], subset=valid, stage="valid")
            if num_samples[1]
            else None,
        )


def _settings(config: T2vConfig) -> ClipSettings:
    data = config.data
    return ClipSettings(
        samples=data.path,
        video_folder=data.video_folder,
        tokenizer=data.tokenizer,
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
