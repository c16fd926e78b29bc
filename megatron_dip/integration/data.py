"""Data access under Megatron: the data set provider of a script, and what its ``get_batch`` does.

Every rank reads every batch, because all need its metadata; only the ranks that hold a stage that
reads pixels decode them, see the families.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_dip.config import load_config
from megatron_dip.data import LookAhead, Microbatch
from megatron_dip.errors import DataError
from megatron_dip.integration.accounting import note_microbatch
from megatron_dip.integration.chunks import StageBatch
from megatron_dip.integration.families import SampleSet, family_of

__all__ = ["data_iterators", "get_batch"]


def get_batch(data_iterator: Iterator[Any]) -> StageBatch | Any:
    """The next batch of a script's ``forward_step``, under either schedule."""
    batch = next(data_iterator)
    if isinstance(batch, StageBatch):
        return batch
    if not isinstance(batch, Microbatch):
        raise DataError(f"expected a microbatch, got {type(batch).__name__}")
    # Evaluation has gradients off.
    if torch.is_grad_enabled():
        note_microbatch(batch)
    device = torch.device("cuda", torch.cuda.current_device())
    return batch.whole(get_args().seq_length).to(device)


def data_iterators(num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
    """Megatron's ``train_valid_test_datasets_provider`` for ``--dataloader-type external``.

    Args:
        num_samples: Samples for training, validation and test.

    Raises:
        DataError: The data set holds samples that cannot be used; see ``--skip-bad-samples``.
    """
    args = get_args()
    config = load_config(args.dip_config)
    train, valid = family_of(config).data_sets(config, num_samples)
    return (
        _iterate(train, args.consumed_train_samples),
        _iterate(valid, args.consumed_valid_samples) if valid is not None else None,
        None,
    )


data_iterators.is_distributed = True  # type: ignore[attr-defined]


def _iterate(dataset: SampleSet, consumed_samples: int) -> LookAhead[Microbatch]:
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
        # The workers decode a whole step while one trains.
        prefetch_factor=_prefetch_factor(args) if args.num_workers else None,
        collate_fn=reporting.collate,
        persistent_workers=args.num_workers > 0,
        # Its base seed must not be drawn from the generator that dropout draws from.
        generator=torch.Generator(),
    )
    return LookAhead(_raise_errors(iter(loader)))


def _prefetch_factor(args: Any) -> int:
    """Microbatches that each worker of a loader makes ahead: all of them together those of a step.

    torch's own default is kept as the least.
    """
    per_step = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return max(2, -(-per_step // args.num_workers))


class _ErrorsAsItems(torch.utils.data.Dataset[Any]):
    """A data set that returns its errors.

    An error raised in a worker of a data loader comes back with the worker's traceback as its
    message; one that is returned keeps its own.
    """

    def __init__(self, dataset: SampleSet) -> None:
        self._dataset = dataset

    def __getitem__(self, i: int) -> Any:
        try:
            return self._dataset[i]
        except DataError as error:
            return error

    def collate(self, items: Sequence[Any]) -> Microbatch | DataError:
        """The microbatch, or the first error in it."""
        sequences = []
        for item in items:
            if isinstance(item, DataError):
                return item
            sequences.append(item)
        return self._dataset.collate_fn(sequences)


def _raise_errors(batches: Iterator[Microbatch | DataError]) -> Iterator[Microbatch]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
