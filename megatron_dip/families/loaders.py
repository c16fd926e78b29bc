"""Megatron's own samplers, loaders and loops over data, for the data sets of this package.

Megatron builds the loaders, so that its arguments about batches, evaluation, order and workers mean
what they mean there.  What it has no place for is put in here: how microbatches are put together,
errors that keep their message, and batches that are no dictionaries of tokens.
"""

import copy
import functools
import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from megatron.core import mpu, num_microbatches_calculator
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, print_rank_0, training

from megatron_dip.errors import DataError
from megatron_dip.families.base import SampleSet
from megatron_dip.families.global_batches import (
    AssignedSampler,
    BatchAssigner,
    Entry,
    GlobalBatchSizes,
)
from megatron_dip.families.packed.batches import Microbatch
from megatron_dip.integration.versions import needed
from megatron_dip.report.steps import AssignmentRecord
from megatron_dip.runtime.signals import hear_stop_signals, started_deaf

__all__ = ["BatchLoader", "LoadedSet", "install_loaders"]


class LoadedSet(torch.utils.data.Dataset[Any]):
    """A data set as Megatron's loaders read it.

    It returns its errors: one that is raised in a worker of a loader comes back with the worker's
    traceback as its message; one that is returned keeps its own.

    Args:
        dataset: The set.
        split: What it is for, by which Megatron chooses sampler and batch size.
    """

    def __init__(self, dataset: SampleSet, split: Split) -> None:
        self._dataset = dataset
        self.split = split
        self.assigner: BatchAssigner | None = None
        """Moves the samples of its global batches, where it is set."""

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: Entry) -> Any:
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


class Microbatches:
    """An iterator over microbatches, known as such to what wraps Megatron's loops.

    Args:
        source: They.
        assigned: What orders them, where their samples are moved.
    """

    def __init__(
        self, source: Iterator[Microbatch], assigned: AssignedSampler | None = None
    ) -> None:
        self._source = source
        self._assigned = assigned

    def __iter__(self) -> Iterator[Microbatch]:
        return self

    def __next__(self) -> Microbatch:
        return next(self._source)

    def assignment_of(self, iteration: int) -> AssignmentRecord | None:
        """What was moved in the batch of an iteration, the newest that is asked for."""
        return None if self._assigned is None else self._assigned.record_of(iteration)


class BatchLoader:
    """A loader of Megatron's as microbatches."""

    def __init__(self, loader: Any, dataset: LoadedSet) -> None:
        args = get_args()
        self._assigned: AssignedSampler | None = None
        if dataset.assigner is not None:
            self._assigned = _assigned_sampler(loader.batch_sampler, dataset.assigner, args)
            loader = _with_sampler(loader, self._assigned)
        self._loader = loader
        loader.collate_fn = dataset.collate
        # Its base seed must not be drawn from the generator that dropout draws from.
        loader.generator = torch.Generator()
        # Microbatches move themselves to the device; the thread that pins would have nothing to do.
        loader.pin_memory = False
        if args.num_workers > 0:
            loader.prefetch_factor = _prefetch_factor(args, dataset.split)
            loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)

    def __len__(self) -> int:
        """Batches of an epoch, as Megatron's samplers count them."""
        return len(self._loader)

    def __iter__(self) -> Microbatches:
        return Microbatches(self.epoch(), self._assigned)

    def epoch(self) -> Iterator[Microbatch]:
        """The microbatches of one epoch; workers start when the first one is asked for.

        Raises:
            DataError: A sample cannot be used.
        """
        others = set(multiprocessing.active_children())
        # Until a worker has its handlers, a signal to the whole job would end it.
        with started_deaf():
            batches = iter(self._loader)
        workers = set(multiprocessing.active_children()) - others
        # With Megatron's handlers they outlive the SIGTERM at the end of this process, which then
        # waits for them: where an error ends it, nobody else has told them to end.
        Finalize(None, _kill, args=(workers,), exitpriority=0)
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Epochs:
    """What Megatron's endless iteration starts anew."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Microbatch]:
        return self._loader.epoch()


def install_loaders() -> None:
    """Have Megatron's training loop read our sets so; does nothing where that is done already.

    Data sets, loaders and iterators of other kinds go Megatron's own way.
    """
    wrappers = {
        "build_pretraining_data_loader": _with_batches,
        "cyclic_iter": _with_epochs,
        "dummy_train_step": _without_dictionaries,
        "evaluate_and_print_results": _with_number_of_batches,
    }
    for name, wrap in wrappers.items():
        original = needed(training, name)
        if not getattr(original, "reads_dip_data", False):
            wrapped = functools.update_wrapper(wrap(original), original)
            wrapped.reads_dip_data = True  # type: ignore[attr-defined]
            setattr(training, name, wrapped)


def _with_batches(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = build(dataset, consumed_samples)
        return BatchLoader(loader, dataset) if isinstance(dataset, LoadedSet) else loader

    return build_loader


def _with_epochs(cyclic: Callable[..., Any]) -> Callable[..., Any]:
    def iterate(iterable: Any) -> Any:
        if isinstance(iterable, BatchLoader):
            return Microbatches(cyclic(_Epochs(iterable)))
        return cyclic(iterable)

    return iterate


def _without_dictionaries(skip: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's step over a batch (``--iterations-to-skip``) reads dictionaries of tokens."""

    def skip_batch(data_iterator: Any) -> None:
        if not isinstance(getattr(data_iterator, "iterable", None), Microbatches):
            skip(data_iterator)
            return
        rerun = get_rerun_state_machine()
        while rerun.should_run_forward_backward(data_iterator):
            for _ in range(get_num_microbatches()):
                next(data_iterator)

    return skip_batch


def _with_number_of_batches(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron (0.19) takes the number for a list under ``--full-validation`` of one set."""

    def evaluate_all(*positional: Any, **named: Any) -> Any:
        args = get_args()
        if args.full_validation and isinstance(args.eval_iters, int):
            args.eval_iters = [args.eval_iters]
        return evaluate(*positional, **named)

    return evaluate_all


def _assigned_sampler(sampler: Any, assigner: BatchAssigner, args: Any) -> AssignedSampler:
    calculator = needed(num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR")
    num_replicas = mpu.get_data_parallel_world_size()
    return AssignedSampler(
        sampler,
        assigner,
        GlobalBatchSizes(num_replicas=num_replicas, calculator=copy.deepcopy(calculator)),
        first_iteration=args.iteration + 1,
        say=print_rank_0,
    )


def _with_sampler(loader: Any, sampler: AssignedSampler) -> Any:
    """``loader``, which is not yet in use, with another batch sampler: torch lets none be set."""
    return torch.utils.data.DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )


def _prefetch_factor(args: Any, split: Split) -> int:
    """Microbatches that each worker of a loader makes ahead: all of them together those of a step.

    torch's own default is kept as the least.
    """
    if split == Split.valid:
        batch, microbatch = args.eval_global_batch_size, args.eval_micro_batch_size
    else:
        batch, microbatch = args.global_batch_size, args.micro_batch_size
    per_step = batch // (microbatch * args.data_parallel_size)
    return max(2, -(-per_step // args.num_workers))


def _start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Megatron's own start of a worker: with ``--exit-signal-handler`` it outlives the signal."""
    if initialize is not None:
        initialize(worker)
    hear_stop_signals()


def _kill(workers: Collection[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
