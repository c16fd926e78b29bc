"""Who waits for whom: the dependencies of one batch, from the module graph and the partition.

The graph knows nothing of time or order.  Planner, lowering, validation, simulator and executor
all ask it, so that a dependency is stated once.

A *work* is one sub-microbatch in one stage.  A *message* is what one work hands to another stage:
inside a module from each stage to the next, across modules from an upstream module's last stage
to a downstream module's first.  Every forward message has a gradient message back where the
upstream side has a backward.  A message is named by the upstream sub-microbatch, once for all of
its readers.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_dip.errors import PlanError
from megatron_dip.limits import MOST_WORKS
from megatron_dip.partition import Partition
from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.plan.trained import StageBackward, stage_backward
from megatron_dip.plan.wiring import Wiring, wire
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["Message", "PipelineGraph", "Work"]


class Work(NamedTuple):
    """One sub-microbatch in one stage."""

    stage: int
    microbatch: int
    sub: int

    def action(self, kind: ActionType) -> Action:
        return Action(self.stage, kind, self.microbatch, self.sub)


class Message(NamedTuple):
    """What stage ``source`` hands to stage ``target``; ``sub`` is of the upstream module."""

    source: int
    target: int
    microbatch: int
    sub: int
    is_gradient: bool

    @property
    def reverse(self) -> "Message":
        """The message that goes back: the gradient of a forward message and vice versa."""
        return Message(self.target, self.source, self.microbatch, self.sub, not self.is_gradient)

    @property
    def upstream_stage(self) -> int:
        return self.target if self.is_gradient else self.source

    @property
    def send(self) -> Action:
        kind = ActionType.SEND_BACKWARD if self.is_gradient else ActionType.SEND_FORWARD
        return Action(self.source, kind, self.microbatch, self.sub, self.target)

    @property
    def receive(self) -> Action:
        kind = ActionType.RECV_BACKWARD if self.is_gradient else ActionType.RECV_FORWARD
        return Action(self.target, kind, self.microbatch, self.sub, self.source)

    @classmethod
    def of(cls, action: Action) -> "Message":
        """The message that a transfer action sends or receives."""
        if action.peer is None or action.microbatch is None:
            raise PlanError(f"{action} is not a transfer")
        source, target = action.stage, action.peer
        if action.type.is_receive:
            source, target = target, source
        gradient = action.type in (ActionType.SEND_BACKWARD, ActionType.RECV_BACKWARD)
        return cls(source, target, action.microbatch, action.sub, gradient)


class PipelineGraph:
    """The dependencies of ``problem`` cut by ``partition`` and split into ``sub_microbatches``.

    Raises:
        PartitionError: The partition does not cover the modules.
        PlanError: The sub-microbatches are not a partition of every microbatch's items.
    """

    def __init__(
        self,
        problem: Problem,
        partition: Partition,
        sub_microbatches: Iterable[SubMicrobatch],
    ) -> None:
        partition.check_covers(problem)
        self.problem = problem
        self.partition = partition
        self.sub_microbatches = tuple(_in_order(problem, sub_microbatches))
        """By microbatch, module (upstream first) and number."""
        self._groups: dict[tuple[str, int], range] = {}
        for index, group in enumerate(self.sub_microbatches):
            key = (group.module, group.microbatch)
            first = self._groups[key].start if key in self._groups else index
            self._groups[key] = range(first, index + 1)
        self._check_subs()
        self._check_size()
        self.stages = tuple(s for name in problem.module_order for s in partition.chains[name])
        """By module and place in its chain."""

    def _check_size(self) -> None:
        """Before memory is taken for every work."""
        num_works = sum(len(self.partition.chains[g.module]) for g in self.sub_microbatches)
        if num_works > MOST_WORKS:
            raise PlanError(
                f"{len(self.sub_microbatches):,} sub-microbatches pass {num_works:,} stages in all "
                f"(expected at most {MOST_WORKS:,}: fewer microbatches, segments or splits)"
            )

    # ---- sub-microbatches -------------------------------------------------------------------

    def _check_subs(self) -> None:
        expected = {
            (name, number)
            for number, microbatch in enumerate(self.problem.microbatches)
            for name, items in microbatch.items()
            if items
        }
        if set(self._groups) != expected:
            odd = sorted(expected ^ set(self._groups))
            raise PlanError(
                f"sub-microbatches missing or without items: (module, microbatch) {odd}"
            )
        for name, number in self._groups:
            subs = self.subs(name, number)
            given = sorted(item for sub_microbatch in subs for item in sub_microbatch.items)
            present = sorted(item.item for item in self.problem.items(name, number))
            numbers = [sub_microbatch.sub for sub_microbatch in subs]
            if given != present or numbers != list(range(len(subs))):
                raise PlanError(
                    f"module {name}, microbatch {number}: sub-microbatches {numbers} hold items "
                    f"{given} (expected sub-microbatches 0, 1, ... holding each of {present} once)"
                )
            if not all(sub_microbatch.items for sub_microbatch in subs):
                raise PlanError(f"module {name}, microbatch {number}: an empty sub-microbatch")

    def _links(self) -> Iterator[tuple[int, int]]:
        """Pairs of sub-microbatches, as indices, of which the second reads the first's output."""
        for below, group in enumerate(self.sub_microbatches):
            for upstream in self.problem.module(group.module).upstream:
                above = self._groups.get((upstream, group.microbatch), range(0))
                needed: set[int] = set()
                for number in group.items if above else ():
                    item = self.problem.item(group.module, group.microbatch, number)
                    needed |= self.problem.needed_items(
                        group.module, group.microbatch, item, upstream
                    )
                for index in above:
                    if needed.intersection(self.sub_microbatches[index].items):
                        yield index, below

    def subs(self, module: str, microbatch: int) -> tuple[SubMicrobatch, ...]:
        """Sub-microbatches of one module in one microbatch, in order of their numbers."""
        groups = self._groups.get((module, microbatch), range(0))
        return self.sub_microbatches[groups.start : groups.stop]

    def sub_microbatch(self, work: Work) -> SubMicrobatch:
        """The items that ``work`` computes on; raises PlanError where there is none."""
        module = self.partition[work.stage].module
        group = self._groups.get((module, work.microbatch), range(0))
        if not 0 <= work.sub < len(group):
            raise PlanError(f"{module} has no sub-microbatch {work.sub} in {work.microbatch}")
        return self.sub_microbatches[group[work.sub]]

    # ---- works and their numbers ------------------------------------------------------------

    @cached_property
    def wiring(self) -> Wiring:
        """Works and messages as numbers; the methods below are views of it."""
        return wire(
            self.problem,
            self.partition,
            self.sub_microbatches,
            tuple(self._links()),
            tuple(self.backwards[stage.stage] for stage in self.stages),
        )

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Every work of the batch, by microbatch, module, chain position and sub-microbatch."""
        columns = (self.wiring.stage, self.wiring.microbatch, self.wiring.sub)
        return tuple(map(Work._make, zip(*(column.tolist() for column in columns), strict=True)))

    @cached_property
    def numbers(self) -> dict[Work, int]:
        """Where a work stands in ``works``."""
        return {work: number for number, work in enumerate(self.works)}

    # ---- what a stage computes --------------------------------------------------------------

    @cached_property
    def backwards(self) -> dict[int, StageBackward]:
        """What of every stage takes part in backwards, by its number."""
        problem, partition = self.problem, self.partition
        return {s.stage: stage_backward(problem, partition, s) for s in partition.stages}

    def has_backward(self, stage: int) -> bool:
        return self.backwards[stage].has_backward

    def has_weight_grad(self, stage: int) -> bool:
        return self.backwards[stage].has_weight_grad

    def is_loss_stage(self, stage: int) -> bool:
        """True for the last stage of a module that no other reads: its output is the loss."""
        return stage in self._loss_stages

    @cached_property
    def _loss_stages(self) -> frozenset[int]:
        names = self.problem.module_order
        read = {name for module in names for name in self.problem.module(module).upstream}
        return frozenset(
            self.partition.last_stage(name).stage for name in names if name not in read
        )

    def compute_actions(self, work: Work, split_backward: bool = False) -> tuple[Action, ...]:
        """The compute actions of ``work`` in the order in which they must run."""
        kinds = [ActionType.FORWARD]
        if self.has_backward(work.stage):
            if not self.has_weight_grad(work.stage):
                kinds.append(ActionType.INPUT_GRAD)
            elif split_backward:
                kinds += [ActionType.INPUT_GRAD, ActionType.WEIGHT_GRAD]
            else:
                kinds.append(ActionType.BACKWARD)
        return tuple(work.action(kind) for kind in kinds)

    # ---- messages ---------------------------------------------------------------------------

    def forward_outputs(self, work: Work) -> tuple[Message, ...]:
        """Messages made by the forward of ``work``."""
        number, (first, targets) = self.numbers[work], self._targets
        return tuple(
            Message(work.stage, target, work.microbatch, work.sub, False)
            for target in targets[slice(*first[number : number + 2])]
        )

    def forward_inputs(self, work: Work) -> tuple[Message, ...]:
        """Messages that the forward of ``work`` waits for, upstream modules in their order."""
        number, (first, sources) = self.numbers[work], self._sources
        makers = [self.works[maker] for maker in sources[slice(*first[number : number + 2])]]
        if self.partition.previous_stage(work.stage) is None:
            upstream = self.problem.module(self.partition[work.stage].module).upstream
            makers.sort(key=lambda maker: upstream.index(self.partition[maker.stage].module))
        return tuple(
            Message(maker.stage, work.stage, maker.microbatch, maker.sub, False) for maker in makers
        )

    @cached_property
    def _targets(self) -> tuple[list[int], list[int]]:
        """Work n makes messages to the stages second[first[n]] to second[first[n + 1]]."""
        wiring = self.wiring
        return wiring.first_message.tolist(), wiring.place_stage[wiring.target].tolist()

    @cached_property
    def _sources(self) -> tuple[list[int], list[int]]:
        """Work n reads the outputs of the works second[first[n]] to second[first[n + 1]]."""
        wiring = self.wiring
        by_reader = np.argsort(wiring.reader, kind="stable")
        first = np.searchsorted(wiring.reader[by_reader], np.arange(len(wiring.stage) + 1))
        return first.tolist(), wiring.reader_source[by_reader].tolist()

    def backward_outputs(self, work: Work) -> tuple[Message, ...]:
        """Gradient messages to which the backward of ``work`` contributes."""
        return tuple(
            message.reverse
            for message in self.forward_inputs(work)
            if self.has_backward(message.source)
        )

    def backward_inputs(self, work: Work) -> tuple[Message, ...]:
        """Gradient messages that the backward of ``work`` waits for."""
        if not self.has_backward(work.stage):
            return ()
        return tuple(message.reverse for message in self.forward_outputs(work))

    def contributors(self, message: Message) -> tuple[Work, ...]:
        """Works whose forward (or, for a gradient, whose backward) must end before ``message``.

        A gradient is the sum over all readers of the forward message; everything else has one.
        """
        if not message.is_gradient:
            return (Work(message.source, message.microbatch, message.sub),)
        return self.readers(message.reverse)

    def readers(self, message: Message) -> tuple[Work, ...]:
        """Works that read ``message``."""
        if message.is_gradient:
            return (Work(message.target, message.microbatch, message.sub),)
        number, (first, targets) = (
            self.numbers[Work(message.source, message.microbatch, message.sub)],
            self._targets,
        )
        wiring = self.wiring
        for index in range(*first[number : number + 2]):
            if targets[index] == message.target:
                readers = wiring.reader[slice(*wiring.first_reader[index : index + 2])]
                return tuple(self.works[reader] for reader in readers.tolist())
        return ()

    def crosses_ranks(self, message: Message) -> bool:
        return self.partition[message.source].rank != self.partition[message.target].rank


def _in_order(problem: Problem, sub_microbatches: Iterable[SubMicrobatch]) -> list[SubMicrobatch]:
    position = {name: index for index, name in enumerate(problem.module_order)}
    return sorted(
        sub_microbatches,
        key=lambda group: (
            group.microbatch,
            position.get(group.module, len(position)),
            group.module,
            group.sub,
        ),
    )
