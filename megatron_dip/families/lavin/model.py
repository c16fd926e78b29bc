"""LaVIN: frozen CLIP and LLaMA towers with routed adapters, over ScienceQA or chats.

Under Megatron's own schedule a rank holds what that wants, as for vision-language models.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Unpack

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.costs import Boundary
from megatron_dip.families.base import ModelFamily, SetLengths, StageFactory
from megatron_dip.families.common import (
    check_vocabulary,
    make_backbone_config,
    shared_index,
    skips_bad_samples,
)
from megatron_dip.families.data.fields import say_unread
from megatron_dip.families.data.index import split_samples
from megatron_dip.families.data.packing import PackingOptions
from megatron_dip.families.forms import TransformerForm
from megatron_dip.families.lavin.adapter import AdapterOptions
from megatron_dip.families.lavin.batches import (
    ClipBatch,
    LavinMicrobatch,
    LavinWholeBatch,
    RoutedBatch,
    RoutedSequence,
)
from megatron_dip.families.lavin.chat import read_chat
from megatron_dip.families.lavin.config import LavinConfig
from megatron_dip.families.lavin.dataset import LavinDataset, LavinSettings
from megatron_dip.families.lavin.image_check import (
    ImageFiles,
    check_images,
    load_checked_images,
    split_by_images,
)
from megatron_dip.families.lavin.instructions import Instruction
from megatron_dip.families.lavin.language import LavinLanguageStage
from megatron_dip.families.lavin.scienceqa import read_scienceqa, to_instruction
from megatron_dip.families.lavin.stages import freeze_towers
from megatron_dip.families.lavin.vision import ClipStage, make_clip_config
from megatron_dip.families.packed.media import decodes_media
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.packed.parts import set_learning_rate_factor
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.models.batches import take_rows

__all__ = ["LavinFamily", "LavinStages", "PackedLavin"]


class PackedLavin(PackedModel):
    """Some images may be in the batch for the released router's sake alone."""

    def features(self, batch: LavinWholeBatch) -> torch.Tensor | None:
        """The features that are read."""
        if batch.wanted == ():
            return self.no_rows("vision")
        features = super().features(batch)
        if features is None or batch.wanted is None or not batch.vision.items:
            return features
        by_image = features.unflatten(0, (len(batch.vision.items), -1))
        return take_rows(by_image, batch.wanted).flatten(0, 1)


class LavinStages(StageFactory):
    """Stages of both towers."""

    model_type = PackedLavin

    def __init__(self, config: LavinConfig, base: TransformerConfig, seed: int) -> None:
        super().__init__(config, seed)
        vision, language, adapter = (
            config.model.vision,
            config.model.language,
            config.model.adapter,
        )
        self._model = config.model
        self.language_config = make_backbone_config(base, language)
        self._vision_config = make_clip_config(
            base, norm_epsilon=vision.norm_epsilon, **vision.sizes()
        )
        self._adapter = AdapterOptions(
            bottleneck=adapter.bottleneck,
            num_groups=adapter.num_groups,
            temperature=adapter.temperature,
            dropout=adapter.dropout,
        )

    @property
    def loss_config(self) -> TransformerConfig:
        """That of the language tower."""
        return self.language_config

    def boundary(self, module: str, *, outer: bool) -> Boundary:
        """See :class:`StageFactory`; feature rows travel beside the rows of their images."""
        plain = super().boundary(module, outer=outer)
        if module != "vision" or outer:
            return plain
        return plain._replace(extra_rows=len(self._model.vision.feature_layers))

    def construct(self, module: str, **layers: Unpack[StageLayers]) -> StageModule:
        """See :class:`StageFactory`."""
        vision, language = self._model.vision, self._model.language
        if module == "vision":
            return ClipStage(
                self._vision_config,
                patch_size=vision.patch_size,
                image_size=vision.image_size,
                feature_layers=vision.feature_layers,
                adapter=self._adapter,
                gates=self._model.adapter.gates,
                **layers,
            )
        return LavinLanguageStage(
            self.language_config,
            adapter=self._adapter,
            feature_size=vision.hidden_size,
            neck_size=self._model.adapter.neck_size,
            vocab_size=language.vocab_size,
            max_sequence_length=language.seq_length,
            rotary_base=language.rotary_base,
            **layers,
        )

    def choose_trained(self, stage: StageModule, form: TransformerForm) -> None:
        """Adapters, neck and modality table; the towers too where tuning is ``full``."""
        if self._model.adapter.tuning != "full":
            freeze_towers(stage)
        factor = form.learning_rate_factor
        assert isinstance(factor, float), "the configuration has refused factors by part"
        set_learning_rate_factor(stage, factor)


class LavinFamily(ModelFamily[LavinConfig]):
    """LaVIN over ScienceQA or chats."""

    def stage_factory(self, config: LavinConfig, base: TransformerConfig, seed: int) -> LavinStages:
        """See :class:`ModelFamily`."""
        return LavinStages(config, base, seed)

    def item_tokens(self, config: LavinConfig, module: str) -> range:
        """Rows of an image, which are always as many; rows of a sequence of one sample."""
        if module == "vision":
            rows = config.model.vision.rows_per_image
            return range(rows, rows + 1)
        return range(2, config.model.language.seq_length + 1)

    def measured_data(
        self, config: LavinConfig, module: str, num_tokens: int
    ) -> ClipBatch | RoutedBatch:
        """One image, or one sample of text with its modality row."""
        size = lavin_settings(config).size
        if module == "vision":
            pixels = torch.zeros(1, size.num_patches, size.values_per_patch)
            return ClipBatch(patches=pixels, items=(0,))
        zeros = torch.zeros(num_tokens, dtype=torch.int64)
        sequence = RoutedSequence(
            tokens=zeros,
            labels=zeros,
            weights=torch.ones(num_tokens),
            num_loss_units=num_tokens,
            sample_lengths=(num_tokens - 1,),
            modalities=(0,),
            image_rows=zeros[:0],
            images=(),
            has_features=(),
        )
        batch = LavinMicrobatch(sequences=(sequence,), image_size=size).sub_batch("language", [0])
        assert isinstance(batch, RoutedBatch)
        return batch

    def data_sets(
        self, config: LavinConfig, lengths: SetLengths
    ) -> tuple[LavinDataset | None, LavinDataset | None]:
        """Sequences; only ranks that hold the first vision stage decode images."""
        args, data = get_args(), config.data
        check_vocabulary(data, config.model.language.vocab_size)
        make = partial(
            LavinDataset,
            lavin_settings(config),
            seed=args.seed,
            decode_images=decodes_media(),
            skip_bad_samples=skips_bad_samples(data),
            source=str(data.path),
        )
        parts = _check_images(config, _read_parts(config, args.seed, lengths))
        if dist.get_rank() == 0:
            unread = (one.unread for part in parts if part is not None for one in part.samples)
            say_unread(str(data.path), unread)
        train, valid = (
            None if part is None else make(part.samples, errors=part.errors, num_samples=length)
            for part, length in zip(parts, (lengths.train, lengths.valid), strict=True)
        )
        return train, valid


class _Part(NamedTuple):
    """Samples of one of the two sets, and why others of it cannot be used."""

    samples: Sequence[Instruction]
    errors: Sequence[str]


def _read_parts(
    config: LavinConfig, seed: int, lengths: SetLengths
) -> tuple[_Part | None, _Part | None]:
    """What is for training and for validation, each where the run needs it."""
    data = config.data
    if data.form == "chat":
        samples, errors = read_chat(data.path)
        train, valid = split_samples(
            range(len(samples)),
            valid_share=data.valid_share,
            seed=seed,
            needs_valid=lengths.needs_valid,
        )
        return (
            _Part([samples[number] for number in train], errors) if lengths.needs_train else None,
            _Part([samples[number] for number in valid], ()) if lengths.needs_valid else None,
        )

    def read(split: str) -> _Part:
        found = read_scienceqa(data.path, data.splits_file, split)
        return _Part([to_instruction(problem) for problem in found.problems], found.errors)

    return (
        read(data.train_split) if lengths.needs_train else None,
        read(data.valid_split) if lengths.needs_valid else None,
    )


def _check_images(
    config: LavinConfig, parts: tuple[_Part | None, _Part | None]
) -> list[_Part | None]:
    """``parts`` without samples whose images do not decode; a collective call of the world."""
    samples = [one for part in parts if part is not None for one in part.samples]
    names = tuple(str(one.image) for one in samples if one.image is not None)
    data = config.data
    files = ImageFiles(samples=data.path, folder=data.image_folder, names=names)
    bad = shared_index(files, data, check_images, load_checked_images)
    checked: list[_Part | None] = []
    for part in parts:
        if part is None:
            checked.append(None)
            continue
        good, more = split_by_images(part.samples, bad)
        checked.append(_Part(good, (*part.errors, *more)))
    return checked


def lavin_settings(config: LavinConfig) -> LavinSettings:
    """How the samples of ``config`` become sequences."""
    data, model = config.data, config.model
    return LavinSettings(
        tokenizer=data.tokenizer,
        text_form=data.text_form(),
        image_folder=data.image_folder,
        image_size=model.vision.image_size,
        patch_size=model.vision.patch_size,
        num_features=len(model.vision.feature_layers),
        seq_length=model.language.seq_length,
        packing=PackingOptions(separation=0.0) if data.packed else None,
        loss=data.loss,
        samples_per_mean=data.samples_per_mean,
        fills_blank_images=model.adapter.gates == "public_code",
    )
