"""Vision-language models: a vision tower, and a language backbone that reads its features.

Under Megatron's own schedule a rank holds what that wants: the whole vision tower with the first
language layers on the first rank, and a run of language layers on every other.
"""

from collections.abc import Sequence
from functools import partial
from math import isqrt

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from megatron.training import get_args

from megatron_dip.config import OmniConfig, VlmConfig
from megatron_dip.data import (
    DataSettings,
    LanguageBatch,
    PackingOptions,
    VisionBatch,
    VlmDataset,
    VlmWholeBatch,
    build_index,
    load_index,
    open_source,
    split_source,
)
from megatron_dip.integration.families.base import ModelFamily, StageFactory
from megatron_dip.integration.families.common import (
    StockModel,
    check_vocabulary,
    make_on_first_rank,
    row_rule,
)
from megatron_dip.models.configs import (
    make_language_config,
    make_projection_config,
    make_vision_config,
)
from megatron_dip.models.language import LanguageStage
from megatron_dip.models.shapes import PATCHES_PER_TOKEN
from megatron_dip.models.stage import StageModule
from megatron_dip.models.vision import VisionStage
from megatron_dip.runtime import BoundaryRules

__all__ = ["StockVlm", "VlmFamily", "VlmStages", "measured_image", "measured_sequence"]


class VlmStages(StageFactory):
    """Stages of the vision tower and of the language backbone."""

    def __init__(self, config: VlmConfig | OmniConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, seed)
        vision, language = config.model.vision, config.model.language
        self._model = config.model
        self.language_config = make_language_config(
            base,
            num_layers=language.num_layers,
            hidden_size=language.hidden_size,
            ffn_hidden_size=language.ffn_hidden_size,
            num_attention_heads=language.num_attention_heads,
            num_query_groups=language.num_query_groups,
            qkv_bias=language.qkv_bias,
            experts=language.experts,
        )
        self._vision_config = make_vision_config(
            base,
            num_layers=vision.num_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
        )
        self._projection_config = make_projection_config(
            base, hidden_size=language.hidden_size, ffn_hidden_size=4 * vision.hidden_size
        )

    @property
    def loss_config(self) -> TransformerConfig:
        """That of the language module."""
        return self.language_config

    def boundaries(self) -> BoundaryRules:
        """See ``megatron_dip.models.shapes``."""
        inner = partial(row_rule, self.language_config)
        vision, language = self._model.vision.hidden_size, self._model.language.hidden_size
        return BoundaryRules(
            inner={"vision": inner(vision), "language": inner(language)},
            # Every tensor-parallel rank holds all of the features' rows.
            outer={"vision": inner(language, tokens_per_row=PATCHES_PER_TOKEN, sharded=False)},
        )

    def construct(
        self, module: str, first_layer: int, num_layers: int, *, first: bool, last: bool
    ) -> VisionStage | LanguageStage:
        """See :class:`StageFactory`."""
        if module == "vision":
            vision = self._model.vision
            return VisionStage(
                self._vision_config,
                self._projection_config,
                first_layer=first_layer,
                num_layers=num_layers,
                first=first,
                last=last,
                patch_size=vision.patch_size,
                position_table_side=vision.position_grid,
            )
        language = self._model.language
        return LanguageStage(
            self.language_config,
            first_layer=first_layer,
            num_layers=num_layers,
            first=first,
            last=last,
            vocab_size=language.vocab_size,
            max_sequence_length=language.seq_length,
            rotary_base=language.rotary_base,
        )

    def stock_model(self, *, pre_process: bool, post_process: bool, sequences: int) -> "StockVlm":
        """See :class:`StageFactory`."""
        return StockVlm(
            self,
            num_vision_layers=self._model.vision.num_layers,
            pre_process=pre_process,
            post_process=post_process,
            sequences=sequences,
        )


class StockVlm(StockModel):
    """What one rank holds under Megatron's own schedule.

    Hidden states of B sequences of S tokens are packed rows [S x B, 1, H] inside and shaped
    [S, B, H] at the boundaries, where Megatron's schedule wants them so.
    """

    def __init__(
        self,
        factory: StageFactory,
        *,
        num_vision_layers: int,
        pre_process: bool,
        post_process: bool,
        sequences: int,
    ) -> None:
        config = factory.loss_config
        super().__init__(config, pre_process=pre_process, post_process=post_process)
        self.vision = (
            factory.build("vision", 0, num_vision_layers, first=True, last=True)
            if pre_process
            else None
        )
        self.language = factory.build(
            "language",
            get_transformer_layer_offset(config),
            get_num_layers_to_build(config),
            first=pre_process,
            last=post_process,
        )
        self.pg_collection = self.language.pg_collection
        self._sequences = sequences

    def forward(self, batch: VlmWholeBatch) -> torch.Tensor:
        """Hidden states [S, B, H], or losses [S x B] on the last rank."""
        hidden = features = None
        if self.vision is not None:
            features = self.features(batch)
        else:
            assert self._input is not None
            hidden = self._input.reshape(-1, 1, self._input.shape[-1])
        output: torch.Tensor = self.language(hidden, batch.language, features)
        if self.post_process:
            return output
        shaped = output.reshape(-1, self._sequences, output.shape[-1])
        # Megatron frees outputs after sending them and refuses to free a view.
        viewless: torch.Tensor = make_viewless_tensor(
            shaped, requires_grad=shaped.requires_grad, keep_graph=True
        )
        return viewless

    def features(self, batch: VlmWholeBatch) -> torch.Tensor | None:
        """What the language module reads of the images; None where there are none."""
        assert self.vision is not None
        return self.vision(None, batch.vision) if batch.vision.items else None

    def stages(self) -> list[StageModule]:
        """See :class:`StockModel`."""
        return [stage for stage in (self.vision, self.language) if stage is not None]


def measured_image(num_patches: int, patch_size: int) -> VisionBatch:
    """One image without meaning, near to a square."""
    groups = num_patches // PATCHES_PER_TOKEN
    rows = max(n for n in range(1, isqrt(groups) + 1) if groups % n == 0)
    return VisionBatch(
        patches=torch.zeros(num_patches, 3 * patch_size**2),
        grids=((2 * rows, 2 * groups // rows),),
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
        num_loss_tokens=num_tokens,
    )


class VlmFamily(ModelFamily[VlmConfig]):
    """Vision-language models over image-text data."""

    def stage_factory(self, config: VlmConfig, base: TransformerConfig, seed: int) -> VlmStages:
        """See :class:`ModelFamily`."""
        return VlmStages(config, base, seed)

    def item_tokens(self, config: VlmConfig, module: str) -> range:
        """Patches of an image, in groups that are merged; tokens of a sequence."""
        if module == "vision":
            largest = PATCHES_PER_TOKEN * config.data.max_image_tokens
            return range(PATCHES_PER_TOKEN, largest + 1, PATCHES_PER_TOKEN)
        return range(1, config.model.language.seq_length + 1)

    def measured_data(
        self, config: VlmConfig, module: str, num_tokens: int
    ) -> VisionBatch | LanguageBatch:
        """One image, near to a square, or one sequence without images."""
        if module == "vision":
            return measured_image(num_tokens, config.model.vision.patch_size)
        return measured_sequence(num_tokens)

    def data_sets(
        self, config: VlmConfig, num_samples: Sequence[int]
    ) -> tuple[VlmDataset, VlmDataset | None]:
        """Packed sequences; only ranks that hold the first vision stage decode images."""
        args = get_args()
        settings = _settings(config)
        folder = config.data.cache_folder or config.data.path.parent
        index = load_index(make_on_first_rank(lambda: build_index(settings, folder)[1], folder))
        check_vocabulary(settings.tokenizer, config.model.language.vocab_size)
        source = open_source(settings)
        train, valid = split_source(source, config.data.valid_share, args.seed)
        make = partial(
            VlmDataset,
            settings,
            index,
            source=source,
            seed=args.seed,
            decode_images=mpu.get_pipeline_model_parallel_rank() == 0,
            skip_bad_samples=config.data.skip_bad_samples or args.skip_bad_samples,
            packing=PackingOptions(separation=config.data.separation),
        )
        return (
            make(num_samples=num_samples[0], subset=train),
            make(num_samples=num_samples[1], subset=valid) if num_samples[1] else None,
        )


def _settings(config: VlmConfig) -> DataSettings:
    return DataSettings(
        format=config.data.format,
        samples=config.data.path,
        image_folder=config.data.image_folder,
        tokenizer=config.data.tokenizer,
        seq_length=config.model.language.seq_length,
        patch_size=config.model.vision.patch_size,
        min_image_tokens=config.data.min_image_tokens,
        max_image_tokens=config.data.max_image_tokens,
    )
