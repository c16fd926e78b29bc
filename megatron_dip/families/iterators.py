"""Data access under Megatron: the data set provider of a script, and what its ``get_batch`` does.

Every rank reads every batch, because all need its metadata; only the ranks that hold a stage that
reads pixels decode them, see the families.  Megatron's own samplers and loaders read the sets, see
``loaders``.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.training import get_args

from megatron_dip.errors import DataError
from megatron_dip.families.accounting import note_microbatch
from megatron_dip.families.base import SampleSet, SetLengths
from megatron_dip.families.configs import load_config
from megatron_dip.families.global_batches import BatchAssigner
from megatron_dip.families.loaders import LoadedSet, install_loaders
from megatron_dip.families.packed.batches import Microbatch
from megatron_dip.families.provider import problem_builder, run_config
from megatron_dip.families.registry import family_of
from megatron_dip.integration.rules import Rule, check_rules
from megatron_dip.integration.saving import protect_saving

__all__ = ["data_sets", "get_batch", "set_lengths"]

logger = logging.getLogger(__name__)

_LOADERS = Rule(
    flag="--dataloader-type",
    destination="dataloader_type",
    allowed=("single", "cyclic"),
    remedy="leave the flag out; a loader of one's own takes a script with a provider of its own",
)
_UNBOUNDED = 2**40
"""More samples than any run reads, where their number is not known beforehand."""


def get_batch(data_iterator: Iterator[Any]) -> Any:
    """The next batch of a script's ``forward_step``: all of a microbatch, or under a plan the data
    of one stage."""
    batch = next(data_iterator)
    if isinstance(batch, Microbatch):
        # Evaluation has gradients off.
        if torch.is_grad_enabled():
            note_microbatch(batch)
        batch = batch.whole(get_args().seq_length)
    device = torch.device("cuda", torch.cuda.current_device())
    return batch.to(device, weights_dtype=get_args().params_dtype)


def data_sets(num_samples: Sequence[int | None]) -> tuple[Any, Any, None]:
    """Megatron's ``train_valid_test_datasets_provider``: sets for training and validation.

    Args:
        num_samples: What Megatron asks for.  Sets are as long as the run needs, see
            :func:`set_lengths`: it counts a resumed run's samples from the start, and with the
            batch sizes and evaluations of today.

    Raises:
        DataError: The data set holds samples that cannot be used; see ``--skip-bad-samples``.
        UnsupportedError: ``--dataloader-type external``.
    """
    args = get_args()
    check_rules(args, (_LOADERS,), "with the data sets of --dip-config")
    install_loaders()
    protect_saving()
    _tell_if_finished(args)
    config = load_config(args.dip_config)
    train, valid = family_of(config).data_sets(config, set_lengths(args))
    loaded = _loaded(train, Split.train, args)
    if loaded is not None and train is not None and config.schedule.assignment != "none":
        builder = problem_builder(args, config, run_config(args))
        loaded.assigner = BatchAssigner(train, builder, config.schedule.assignment)
    return loaded, _loaded(valid, Split.valid, args), None


data_sets.is_distributed = True  # type: ignore[attr-defined]


def set_lengths(args: Any) -> SetLengths:
    """How many samples of each set the run reads, counted from the data set's first one."""
    evaluates = args.full_validation or args.eval_iters > 0
    if args.dataloader_type == "cyclic":
        return SetLengths(train=0 if args.skip_train else None, valid=None if evaluates else 0)
    return SetLengths(
        train=0 if args.skip_train else _train_length(args),
        valid=(None if args.full_validation else _valid_length(args)) if evaluates else 0,
    )


def _train_length(args: Any) -> int:
    if args.step_batch_size_schedule:
        return _UNBOUNDED
    # At least one batch: Megatron's sampler refuses a set of which nothing is left, although a
    # run that is finished does not read it.
    num_left = max(args.train_iters - args.iteration, 1)
    return int(args.consumed_train_samples + num_left * args.global_batch_size)


def _valid_length(args: Any) -> int:
    if args.skip_train:
        return int(args.eval_iters * args.eval_global_batch_size)
    interval = args.eval_interval
    # And one after training.
    num_left = max(args.train_iters // interval - args.iteration // interval, 0) + 1
    return int(
        args.consumed_valid_samples + num_left * args.eval_iters * args.eval_global_batch_size
    )


def _tell_if_finished(args: Any) -> None:
    is_finished = 0 < args.train_iters <= args.iteration if args.train_iters else False
    if is_finished and not args.skip_train and dist.get_rank() == 0:
        logger.warning(
            "nothing is left to train: the checkpoint is of iteration %d of %d (raise "
            "--train-iters or --train-samples to go on)",
            args.iteration,
            args.train_iters,
        )


def _loaded(dataset: SampleSet | None, split: Split, args: Any) -> LoadedSet | None:
    """
    Raises:
        DataError: The samples of an epoch do not fit Megatron's sampler.
    """
    if dataset is None:
        return None
    num_replicas = mpu.get_data_parallel_world_size()
    if split == Split.valid and args.full_validation:
        _check_epoch(len(dataset), num_replicas, split, "--full-validation")
    elif args.dataloader_type == "cyclic":
        is_valid = split == Split.valid
        size = args.eval_micro_batch_size if is_valid else args.micro_batch_size
        consumed = args.consumed_valid_samples if is_valid else args.consumed_train_samples
        _check_epoch(len(dataset), size * num_replicas, split, "--dataloader-type cyclic")
        if consumed % (size * num_replicas):
            raise DataError(
                f"--dataloader-type cyclic goes on between whole microbatches of all replicas, but "
                f"{consumed} samples of the {split.name} set were read, which {num_replicas} "
                f"replicas with microbatches of {size} do not divide: use the sizes of before"
            )
    return LoadedSet(dataset, split)


def _check_epoch(num_samples: int, needed: int, split: Split, flag: str) -> None:
    if num_samples < needed:
        raise DataError(
            f"an epoch of the {split.name} set has {num_samples} samples, but {flag} needs "
            f"{needed}, for one microbatch of every replica: use more data or fewer replicas"
        )
