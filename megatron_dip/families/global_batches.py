"""Global batches whose samples are assigned to replicas and microbatches before they are read.

Which sequences a global batch has is a function of the samples consumed before it, and what they
cost is known from the index.  So every rank works out the same assignment of the whole batch, with
no message, and reads its own share.  A batch keeps its samples, wherever they are moved to: what
comes after it, also in a resumed run, is what it would have been.

``microbatches`` moves whole microbatches between replicas, each of which keeps their number.
``samples`` moves single samples: into other sequences, where these are packed, up to their length,
and else against a sample of another microbatch.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, Literal

from megatron_dip.assignment.samples import GroupCosts, SlotFiller
from megatron_dip.costs import ItemSizes, ProblemBuilder
from megatron_dip.families.base import SampleSet
from megatron_dip.report.steps import AssignmentRecord

__all__ = ["AssignedSampler", "BatchAssigner", "GlobalBatchSizes"]

Entry = int | tuple[Hashable, ...]
"""What is asked of a data set for one sequence: its number, or its members."""
Numbers = Sequence[Sequence[int]]
"""The microbatches of one replica, as numbers of sequences."""
ReplicaBatch = list[list[Entry]]
"""The same, as it is asked for."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatchSizes:
    """Sizes of global batches as Megatron counts them."""

    num_replicas: int
    calculator: Any
    """A copy of Megatron's calculator of microbatches, which is updated here."""

    def at(self, num_consumed: int) -> tuple[int, int]:
        """Microbatches of a replica, and samples, of the batch after so many samples."""
        self.calculator.update(num_consumed, False)
        return self.calculator.get(), self.calculator.get_current_running_global_batch_size()


class BatchAssigner:
    """Assigns the sequences of global batches of one data set.

    Args:
        dataset: The set.
        builder: Of the problems of the run, with nothing measured in it: it must be the same on all
            ranks.
        moves: See the top of this file.
    """

    def __init__(
        self, dataset: SampleSet, builder: ProblemBuilder, moves: Literal["microbatches", "samples"]
    ) -> None:
        self.moves = moves
        self._dataset = dataset
        self._filler = SlotFiller(builder)

    def assign(self, batch: Sequence[Numbers]) -> tuple[list[ReplicaBatch], AssignmentRecord]:
        """The same sequences, or samples, at their new places, and what that changes.

        Args:
            batch: Of all replicas: numbers of sequences.
        """
        if self.moves == "microbatches":
            return self._move_microbatches(batch)
        return self._move_samples(batch)

    def _move_microbatches(
        self, batch: Sequence[Numbers]
    ) -> tuple[list[ReplicaBatch], AssignmentRecord]:
        whole = list(chain.from_iterable(batch))
        counts = [len(replica) for replica in batch]
        costs = self._filler.costs([self._sizes(self._members(one)) for one in whole])
        places = range(len(whole))
        slots = self._filler.fill(costs, places, counts)
        record = self._filler.record(costs, places, slots, counts)
        return _cut([[*whole[group]] for (group,) in slots], counts), record

    def _move_samples(
        self, batch: Sequence[Numbers]
    ) -> tuple[list[ReplicaBatch], AssignmentRecord]:
        whole, size = list(chain.from_iterable(batch)), len(batch[0][0])
        counts = [len(replica) for replica in batch]
        members = [self._members(microbatch) for microbatch in whole]
        samples = list(chain.from_iterable(members))
        places = [number for number, content in enumerate(members) for _ in content]
        costs = self._filler.costs([[sizes] for sizes in self._sizes(samples)])
        if self._dataset.room is None:
            slots = self._filler.fill(costs, places, counts, most_groups=size)
            moved = [[(samples[group],) for group in slot] for slot in slots]
        else:
            sequences = self._pack(whole, costs, counts)
            moved = [
                [tuple(samples[group] for group in sequence) for sequence in microbatch]
                for microbatch in sequences
            ]
            slots = [list(chain.from_iterable(microbatch)) for microbatch in sequences]
        return _cut(moved, counts), self._filler.record(costs, places, slots, counts)

    def _pack(
        self, whole: Sequence[Sequence[int]], costs: GroupCosts, counts: Sequence[int]
    ) -> list[list[list[int]]]:
        """The samples of every sequence of every microbatch: first packed into sequences, which
        then are put together."""
        size = len(whole[0])
        lengths = [len(self._dataset.members(i)) for i in chain.from_iterable(whole)]
        sequences = self._filler.fill(
            costs,
            [place for place, length in enumerate(lengths) for _ in range(length)],
            [size * count for count in counts],
            most_tokens=self._dataset.room,
        )
        if size == 1:
            return [[sequence] for sequence in sequences]
        slots = self._filler.fill(
            costs.joined(sequences),
            [place // size for place in range(len(sequences))],
            counts,
            most_groups=size,
        )
        return [[sequences[number] for number in slot] for slot in slots]

    def _members(self, sequences: Iterable[int]) -> list[Any]:
        return [member for i in sequences for member in self._dataset.members(i)]

    def _sizes(self, members: Iterable[Any]) -> list[ItemSizes]:
        return [self._dataset.member_sizes(member) for member in members]


def _cut(microbatches: Sequence[Any], counts: Sequence[int]) -> list[ReplicaBatch]:
    """``microbatches`` of all replicas as those of each."""
    rest = iter(microbatches)
    return [list(islice(rest, count)) for count in counts]


class AssignedSampler:
    """Megatron's batch sampler of this replica, with the samples of each global batch moved.

    A microbatch is a list of what is to be asked of the data set.

    Args:
        sampler: Megatron's, of any replica; the others have the same but for their number.
        assigner: Moves the samples.
        sizes: Of global batches.
        first_iteration: The one that the first batch is for.
        say: Is told once what is done.
    """

    def __init__(
        self,
        sampler: Any,
        assigner: BatchAssigner,
        sizes: GlobalBatchSizes,
        *,
        first_iteration: int,
        say: Callable[[str], None],
    ) -> None:
        self._sampler = sampler
        self._assigner = assigner
        self._sizes = sizes
        self._first_iteration = first_iteration
        self._say = say
        self._records: dict[int, AssignmentRecord] = {}

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[Entry]]:
        own: int = self._sampler.data_parallel_rank
        replicas = [iter(self._of(replica)) for replica in range(self._sizes.num_replicas)]
        consumed: int = self._sampler.consumed_samples
        for iteration in count(self._first_iteration):
            num_microbatches, num_samples = self._sizes.at(consumed)
            batch = [list(islice(replica, num_microbatches)) for replica in replicas]
            if any(len(replica) < num_microbatches for replica in batch):
                # The end of the data, of which no whole batch is trained on.
                yield from batch[own]
                return
            assigned, record = self._assigner.assign(batch)
            if iteration == self._first_iteration:
                self._say(
                    f"schedule.assignment {self._assigner.moves}, first batch: {record.summary()}"
                )
            self._records[iteration] = record
            yield from assigned[own]
            consumed += num_samples

    def record_of(self, iteration: int) -> AssignmentRecord | None:
        """What was moved in the batch of an iteration; those of earlier ones are forgotten."""
        self._records = {n: record for n, record in self._records.items() if n >= iteration}
        return self._records.get(iteration)

    def _of(self, replica: int) -> Any:
        sampler = copy.copy(self._sampler)
        sampler.data_parallel_rank = replica
        return sampler
