"""A script's own microbatches, their samples exchanged so that all have alike work.

A script's iterator gives a replica its own microbatches and no other ones, so that nothing moves
between replicas.  The microbatches of a step are read together; each keeps its number of samples.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_dip.assignment.samples import SlotFiller
from megatron_dip.config import ScheduleConfig
from megatron_dip.costs import ProblemBuilder
from megatron_dip.errors import ConfigError
from megatron_dip.integration.expert_rules import loss_over_microbatch
from megatron_dip.models.staged import StagedModel
from megatron_dip.report.steps import AssignmentRecord

__all__ = ["Recut", "check_recut"]


def check_recut(schedule: ScheduleConfig, staged: StagedModel, config: Any, args: Any) -> None:
    """Refuse ``schedule.assignment`` for a script with data of its own where it would train
    something else, or cannot be done.

    Args:
        config: Megatron's configuration of the module with the loss.
        args: The arguments of the run.

    Raises:
        ConfigError: Says why, and what to do.
        UnsupportedError: A microbatch cannot be divided.
    """
    moves = schedule.assignment
    if moves == "none" or staged.assigns_samples:
        return
    stated = f"schedule.assignment {moves} does not work with"
    if moves == "microbatches":
        raise ConfigError(
            f"{stated} a script that reads its own data: a replica knows its own microbatches "
            f"alone (use samples, which exchanges samples among these, or leave it out)"
        )
    if not config.calculate_per_token_loss:
        raise ConfigError(
            f"{stated} a loss that is the mean of the means of microbatches: a sample that moves "
            f"would weigh more or less (add --calculate-per-token-loss, or leave it out)"
        )
    flag = loss_over_microbatch(config)
    if flag is not None:
        raise ConfigError(
            f"{stated} {flag}, which is taken over all tokens of a microbatch (leave it out)"
        )
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if getattr(args, name, None):
            raise ConfigError(
                f"{stated} --{name.replace('_', '-')}: batches that are read ahead would be cut "
                f"at other places than the steps are (leave it out)"
            )
    staged.check_split(staged.modules()[-1].name)


class Recut:
    """An iterator over the microbatches of ``source``, those of a step cut anew.

    Args:
        source: The script's.
        staged: Tells samples apart.
        builder: Of the problems of the run, with nothing measured in it.
        first_iteration: The one that the first batch is for.
        say: Is told once what is done.
    """

    def __init__(
        self,
        source: Iterator[Any],
        staged: StagedModel,
        builder: ProblemBuilder,
        *,
        first_iteration: int,
        say: Callable[[str], None],
    ) -> None:
        self._source = source
        self._staged = staged
        self._filler = SlotFiller(builder)
        self._iteration = first_iteration - 1
        self._say: Callable[[str], None] | None = say
        self._ready: list[Any] = []
        self._error: Exception | None = None
        self._records: dict[int, AssignmentRecord] = {}

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._ready:
            if self._error is None:
                self._read()
            if not self._ready:
                assert self._error is not None
                raise self._error
        return self._ready.pop(0)

    def assignment_of(self, iteration: int) -> AssignmentRecord | None:
        """What was moved in the batch of an iteration; those of earlier ones are forgotten."""
        self._records = {n: record for n, record in self._records.items() if n >= iteration}
        return self._records.get(iteration)

    @property
    def save_state(self) -> Callable[[], Any]:
        """That of the source, which is asked for where a step ends.

        Raises:
            AttributeError: It has none.
        """
        found: Callable[[], Any] = self._source.save_state  # type: ignore[attr-defined]
        return found

    def _read(self) -> None:
        """The microbatches of a step; those before an error, or the end, as they are."""
        batches: list[Any] = []
        self._iteration += 1
        try:
            for _ in range(get_num_microbatches()):
                batches.append(next(self._source))
        except Exception as error:
            self._ready, self._error = batches, error
            return
        try:
            self._ready = self._cut(batches)
        except Exception as error:
            self._error = error

    def _cut(self, batches: Sequence[Any]) -> list[Any]:
        apart = [self._staged.single_samples(batch) for batch in batches]
        samples = list(chain.from_iterable(apart))
        places = [place for place, content in enumerate(apart) for _ in content]
        costs = self._filler.costs([[self._staged.items(sample)] for sample in samples])
        counts = [len(batches)]
        # Microbatches have one size, and where all are full samples can only be exchanged.
        slots = self._filler.fill(costs, places, counts, most_groups=max(map(len, apart)))
        record = self._filler.record(costs, places, slots, counts)
        self._records[self._iteration] = record
        if self._say is not None:
            self._say(f"schedule.assignment samples, first batch: {record.summary()}")
            self._say = None
        return [
            self._staged.join_samples([samples[number] for number in slot])
            if slot != [number for number, place in enumerate(places) if place == index]
            else batches[index]
            for index, slot in enumerate(slots)
        ]
