"""The batches after the one that trains, on their way from the data to their plans."""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training.utils import print_rank_0

from megatron_dip.costs import BatchSizes
from megatron_dip.errors import ConfigError
from megatron_dip.integration.pipeline import DipPipeline
from megatron_dip.integration.recut import Recut
from megatron_dip.integration.trace import iteration_number
from megatron_dip.report.steps import AssignmentRecord
from megatron_dip.runtime import Recorder
from megatron_dip.runtime.look_ahead import LookAhead, SizedBatch

__all__ = ["Ahead", "own_iterator", "pull", "skip_batch"]


class Ahead:
    """Reads ahead beneath Megatron's rerun iterator; a script's own iterator has no look-ahead.

    Args:
        data_iterator: As Megatron gives it to a schedule; None on ranks without data.
        trains: Whether this is a step of training, whose samples may be exchanged.

    Raises:
        ConfigError: They are to be, and the script's iterator cannot be read ahead.
    """

    def __init__(
        self,
        pipeline: DipPipeline,
        data_iterator: Any,
        num_microbatches: int,
        *,
        trains: bool,
    ) -> None:
        self._pipeline = pipeline
        self._num_microbatches = num_microbatches
        self._source: LookAhead | None = None
        self._has_data = data_iterator is not None
        if hasattr(data_iterator, "iterable"):
            if not isinstance(data_iterator.iterable, LookAhead):
                source = data_iterator.iterable
                if trains and pipeline.recuts:
                    source = Recut(
                        source,
                        pipeline.staged,
                        pipeline.stated_problems,
                        first_iteration=iteration_number(),
                        say=print_rank_0,
                    )
                data_iterator.iterable = LookAhead(source, pipeline.staged.items)
            self._source = data_iterator.iterable
        elif self._has_data and trains and pipeline.recuts:
            raise ConfigError(
                f"schedule.assignment {pipeline.config.schedule.assignment} does not work with a "
                f"training loop that reads its iterator itself (expected Megatron's train_step, "
                f"which wraps it: leave schedule.assignment out)"
            )

    def start(self) -> None:
        """Read ahead in the first step, which waits for its own plan: others are made meanwhile."""
        if self._source is not None and not self._source.num_held:
            self._read()

    def go_on(self, recorder: Recorder) -> None:
        """Pass on the next plan, if there is one, read on, and request the plans that follow.

        After the last action, because what a GPU still has to do of this step hides it.
        """
        start_us = recorder.now_us()
        source, pipeline = self._source, self._pipeline
        coming: Sequence[BatchSizes] | None = () if self._has_data else None
        if source is not None:
            coming = source.coming(self._num_microbatches)
        planned = pipeline.plans.offer(coming)
        if planned is not None:
            pipeline.executor.prepare(planned)
        self._read()
        recorder.record("look ahead", start_us)

    def assignment_of(self, iteration: int) -> AssignmentRecord | None:
        """What was moved in the batch of an iteration before it was read; None: nothing."""
        return None if self._source is None else self._source.assignment_of(iteration)

    def _read(self) -> None:
        if self._source is not None:
            self._source.hold(self._num_microbatches * self._pipeline.config.planning.look_ahead)
            self._pipeline.plans.request(self._source.coming(self._num_microbatches))


def own_iterator(data_iterator: Any) -> Any:
    """The iterator of this rank.

    megatron-bridge makes one per chunk, which share what they have read of it in a cache.
    """
    if not isinstance(data_iterator, list):
        return data_iterator
    shared = getattr(data_iterator[0], "cache", None)
    return data_iterator[0] if shared is None else shared.iterator


def pull(
    pipeline: DipPipeline, data_iterator: Iterator[Any] | None, num_microbatches: int
) -> tuple[list[Any], BatchSizes | None]:
    """The microbatches of a step with the sizes of their items.

    Returns:
        What the script's iterator yields, and sizes; Nones on a rank without data.
    """
    if data_iterator is None:
        return [None] * num_microbatches, None
    pulled = [next(data_iterator) for _ in range(num_microbatches)]
    sized = [
        one if isinstance(one, SizedBatch) else SizedBatch(one, pipeline.staged.items(one))
        for one in pulled
    ]
    return [one.batch for one in sized], tuple(one.sizes for one in sized)


def skip_batch(data_iterator: Iterator[Any] | None) -> None:
    """Read the microbatches of a step and drop them (``--iterations-to-skip``)."""
    rerun = get_rerun_state_machine()
    while rerun.should_run_forward_backward(data_iterator):
        if data_iterator is not None:
            for _ in range(get_num_microbatches()):
                next(data_iterator)
