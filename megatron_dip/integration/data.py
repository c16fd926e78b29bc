"""Data access under Megatron: the data set provider of a script, and what its ``get_batch`` does.

Every rank reads every batch, because all need its metadata; only the ranks that hold the first
vision stage decode images.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_dip.config import DipConfig, load_config
from megatron_dip.data import (
    DataIndex,
    DataSettings,
    LanguageBatch,
    PackedSequence,
    PackingOptions,
    VisionBatch,
    VlmDataset,
    VlmMicrobatch,
    build_index,
    load_index,
    load_tokenizer,
    split_samples,
)
from megatron_dip.errors import ConfigError, DataError
from megatron_dip.integration.chunks import StageBatch

__all__ = ["WholeBatch", "data_iterators", "get_batch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """A microbatch for Megatron's own schedule: all images, and sequences of one fixed length."""

    vision: VisionBatch
    language: LanguageBatch

    @property
    def loss_mask(self) -> torch.Tensor:
        """[sequences x seq_length], float."""
        return self.language.loss_mask


def get_batch(data_iterator: Iterator[Any]) -> StageBatch | WholeBatch:
    """The next batch of a script's ``forward_step``, under either schedule."""
    batch = next(data_iterator)
    if isinstance(batch, StageBatch):
        return batch
    if not isinstance(batch, VlmMicrobatch):
        raise DataError(f"expected a VlmMicrobatch, got {type(batch).__name__}")
    device = torch.device("cuda", torch.cuda.current_device())
    images = range(len(batch.images))
    return WholeBatch(
        vision=batch.sub_batch("vision", images).to(device),
        language=batch.padded(get_args().seq_length).to(device),
    )


def data_iterators(num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
    """Megatron's ``train_valid_test_datasets_provider`` for ``--dataloader-type external``.

    Args:
        num_samples: Packed sequences for training, validation and test.

    Raises:
        DataError: The data set holds samples that cannot be used; see ``--skip-bad-samples``.
    """
    args = get_args()
    config = load_config(args.dip_config)
    skip = config.data.skip_bad_samples or args.skip_bad_samples
    settings = _settings(config)
    index = _shared_index(config, settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise ConfigError(
            f"{settings.tokenizer} has {tokenizer.vocab_size} tokens but "
            f"model.language.vocab_size is {config.model.language.vocab_size} (raise it)"
        )
    train, valid = split_samples(
        range(len(index.samples)), valid_share=config.data.valid_share, seed=args.seed
    )
    make = partial(
        VlmDataset,
        settings,
        index,
        seed=args.seed,
        decode_images=mpu.get_pipeline_model_parallel_rank() == 0,
        skip_bad_samples=skip,
        packing=PackingOptions(separation=config.data.separation),
    )
    return (
        _iterate(make(num_samples=num_samples[0], subset=train), args.consumed_train_samples),
        _iterate(make(num_samples=num_samples[1], subset=valid), args.consumed_valid_samples)
        if num_samples[1]
        else None,
        None,
    )


data_iterators.is_distributed = True  # type: ignore[attr-defined]


def _settings(config: DipConfig) -> DataSettings:
    return DataSettings(
        samples=config.data.path,
        image_folder=config.data.image_folder,
        tokenizer=config.data.tokenizer,
        seq_length=config.model.language.seq_length,
        patch_size=config.model.vision.patch_size,
        min_image_tokens=config.data.min_image_tokens,
        max_image_tokens=config.data.max_image_tokens,
    )


def _shared_index(config: DipConfig, settings: DataSettings) -> DataIndex:
    """The index, made by the first rank of the world and read by the others.

    The folder must be visible to all ranks.  A failure of the first rank is raised on all.
    """
    folder = config.data.cache_folder or config.data.path.parent
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            _, path = build_index(settings, folder)
            outcome = [str(path), None]
        except DataError as error:
            outcome = [None, str(error)]
        except OSError as error:
            outcome = [
                None,
                f"the data index cannot be kept in {folder} ({error.strerror}): name a folder "
                f"that can be written to as data.cache_folder",
            ]
    dist.broadcast_object_list(outcome, src=0)
    shared_path, failure = outcome
    if failure is not None:
        raise DataError(failure)
    return load_index(shared_path)


def _iterate(dataset: VlmDataset, consumed_samples: int) -> Iterator[VlmMicrobatch]:
    args = get_args()
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    reporting = _ErrorsAsItems(dataset)
    loader = torch.utils.data.DataLoader(
        reporting,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        collate_fn=reporting.collate,
        persistent_workers=args.num_workers > 0,
        # Its base seed must not be drawn from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    return _raise_errors(iter(loader))


class _ErrorsAsItems(torch.utils.data.Dataset[PackedSequence | DataError]):
    """A data set that returns its errors.

    An error raised in a worker of a data loader comes back with the worker's traceback as its
    message; one that is returned keeps its own.
    """

    def __init__(self, dataset: VlmDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, i: int) -> PackedSequence | DataError:
        try:
            return self._dataset[i]
        except DataError as error:
            return error

    def collate(self, items: Sequence[PackedSequence | DataError]) -> VlmMicrobatch | DataError:
        """The microbatch, or the first error in it."""
        sequences = []
        for item in items:
            if isinstance(item, DataError):
                return item
            sequences.append(item)
        return self._dataset.collate_fn(sequences)


def _raise_errors(batches: Iterator[VlmMicrobatch | DataError]) -> Iterator[VlmMicrobatch]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
