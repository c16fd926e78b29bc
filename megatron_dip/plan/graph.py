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

from megatron_dip.errors import PlanError
from megatron_dip.partition import Partition, Stage
from megatron_dip.plan.actions import Action, ActionType
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
        self._subs: dict[tuple[str, int], list[SubMicrobatch]] = {}
        for sub_microbatch in sub_microbatches:
            key = (sub_microbatch.module, sub_microbatch.microbatch)
            self._subs.setdefault(key, []).append(sub_microbatch)
        self._check_subs()
        self._upstream: dict[tuple[str, int, int, str], tuple[int, ...]] = {}
        self._readers: dict[tuple[str, int, int, str], list[int]] = {}
        self._link_subs()

    # ---- sub-microbatches -------------------------------------------------------------------

    def _check_subs(self) -> None:
        expected = {
            (name, number)
            for number, microbatch in enumerate(self.problem.microbatches)
            for name, items in microbatch.items()
            if items
        }
        if set(self._subs) != expected:
            odd = sorted(expected ^ set(self._subs))
            raise PlanError(
                f"sub-microbatches missing or without items: (module, microbatch) {odd}"
            )
        for (name, number), subs in self._subs.items():
            subs.sort(key=lambda sub_microbatch: sub_microbatch.sub)
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

    def _link_subs(self) -> None:
        for (name, number), subs in self._subs.items():
            for upstream in self.problem.module(name).upstream:
                for sub_microbatch in subs:
                    needed: set[int] = set()
                    for item_number in sub_microbatch.items:
                        item = self.problem.item(name, number, item_number)
                        needed |= self.problem.needed_items(name, number, item, upstream)
                    feeding = tuple(
                        other.sub
                        for other in self.subs(upstream, number)
                        if needed.intersection(other.items)
                    )
                    self._upstream[name, number, sub_microbatch.sub, upstream] = feeding
                    for sub in feeding:
                        readers = self._readers.setdefault((upstream, number, sub, name), [])
                        readers.append(sub_microbatch.sub)

    def subs(self, module: str, microbatch: int) -> tuple[SubMicrobatch, ...]:
        """Sub-microbatches of one module in one microbatch, in order of their numbers."""
        return tuple(self._subs.get((module, microbatch), ()))

    def sub_microbatch(self, work: Work) -> SubMicrobatch:
        """The items that ``work`` computes on; raises PlanError where there is none."""
        module = self.partition[work.stage].module
        subs = self._subs.get((module, work.microbatch), ())
        if not 0 <= work.sub < len(subs):
            raise PlanError(f"{module} has no sub-microbatch {work.sub} in {work.microbatch}")
        return subs[work.sub]

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """Every work of the batch, by microbatch, module, chain position and sub-microbatch."""
        return tuple(
            Work(stage.stage, number, sub_microbatch.sub)
            for number in range(self.problem.num_microbatches)
            for name in self.problem.module_order
            for stage in self.partition.chains[name]
            for sub_microbatch in self.subs(name, number)
        )

    # ---- what a stage computes --------------------------------------------------------------

    def has_backward(self, stage: int) -> bool:
        return self.partition[stage].module in self.problem.modules_with_backward

    def has_weight_grad(self, stage: int) -> bool:
        return self.problem.module(self.partition[stage].module).trainable

    def is_loss_stage(self, stage: int) -> bool:
        """True for the last stage of a module that no other reads: its output is the loss."""
        module = self.partition[stage].module
        is_last = self.partition.last_stage(module).stage == stage
        return is_last and not any(self._downstream(module))

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

    def _downstream(self, module: str) -> Iterator[str]:
        for other in self.problem.module_order:
            if module in self.problem.module(other).upstream:
                yield other

    def forward_outputs(self, work: Work) -> tuple[Message, ...]:
        """Messages made by the forward of ``work``."""
        following = self.partition.next_stage(work.stage)
        if following is not None:
            return (Message(work.stage, following.stage, work.microbatch, work.sub, False),)
        module = self.partition[work.stage].module
        return tuple(
            Message(work.stage, self._entry(other).stage, work.microbatch, work.sub, False)
            for other in self._downstream(module)
            if self._readers.get((module, work.microbatch, work.sub, other))
        )

    def forward_inputs(self, work: Work) -> tuple[Message, ...]:
        """Messages that the forward of ``work`` waits for, upstream modules in their order."""
        previous = self.partition.previous_stage(work.stage)
        if previous is not None:
            return (Message(previous.stage, work.stage, work.microbatch, work.sub, False),)
        module = self.partition[work.stage].module
        return tuple(
            Message(self._exit(upstream).stage, work.stage, work.microbatch, sub, False)
            for upstream in self.problem.module(module).upstream
            for sub in self._upstream[module, work.microbatch, work.sub, upstream]
        )

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
        source, target = self.partition[message.source], self.partition[message.target]
        if source.module == target.module:
            return (Work(message.target, message.microbatch, message.sub),)
        key = (source.module, message.microbatch, message.sub, target.module)
        return tuple(
            Work(message.target, message.microbatch, sub) for sub in self._readers.get(key, ())
        )

    def crosses_ranks(self, message: Message) -> bool:
        return self.partition[message.source].rank != self.partition[message.target].rank

    def message_bytes(self, message: Message) -> int:
        """Bytes that ``message`` moves: the boundary of the upstream items."""
        work = Work(message.upstream_stage, message.microbatch, message.sub)
        sub_microbatch = self.sub_microbatch(work)
        return sum(
            self.problem.item(
                sub_microbatch.module, sub_microbatch.microbatch, number
            ).boundary_bytes
            for number in sub_microbatch.items
        )

    def _entry(self, module: str) -> Stage:
        return self.partition.first_stage(module)

    def _exit(self, module: str) -> Stage:
        return self.partition.last_stage(module)
