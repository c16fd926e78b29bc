"""Megatron's saving of checkpoints: kept from signals to the whole job, and from doing it twice.

Megatron collects what was written in a process of its own, which it starts at the first save, and
with ``--async-save`` it may keep one that writes.  A signal that ended them would cost the very
checkpoint that ``--exit-signal-handler`` is there for.  And it saves once more at the end of a run
that had nothing left to train, over the good checkpoint.
"""

import functools
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.training import get_args, training

from megatron_dip.integration.versions import needed
from megatron_dip.runtime.signals import started_deaf

__all__ = ["protect_saving"]


def protect_saving() -> None:
    """Change both; does nothing where that is done already."""
    for owner, name, wrap in (
        (filesystem_async, "get_write_results_queue", _deaf),
        (async_utils.PersistentAsyncCaller, "_get_process", _deaf),
        (training, "save_checkpoint_and_time", _once),
    ):
        original = needed(owner, name)
        if not getattr(original, "protects_saving", False):
            wrapped = functools.update_wrapper(wrap(original), original)
            wrapped.protects_saving = True  # type: ignore[attr-defined]
            setattr(owner, name, wrapped)


def _deaf(start: Callable[..., Any]) -> Callable[..., Any]:
    def start_deaf(*args: Any, **kwargs: Any) -> Any:
        # Started on the way, it would let signals through again.
        resource_tracker.ensure_running()
        with started_deaf():
            return start(*args, **kwargs)

    return start_deaf


def _once(save: Callable[..., Any]) -> Callable[..., Any]:
    def save_what_is_new(iteration: int, *args: Any, **kwargs: Any) -> Any:
        return None if _is_there(iteration) else save(iteration, *args, **kwargs)

    return save_what_is_new


def _is_there(iteration: int) -> bool:
    """Whether this iteration's checkpoint is what the run was loaded from, in the same folder."""
    args = get_args()
    if not args.load or not args.save or iteration != args.iteration:
        return False
    return Path(args.load).resolve() == Path(args.save).resolve()
