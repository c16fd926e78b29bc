"""A plan as one rank runs it: what an action needs of the plan, looked up before the first one.

The graph answers for any work of any rank.  Asked in every action, it would cost more than a small
action does; here it is asked once for every work, and forward and backward share the answer.

Where every stream has a hardware queue of its own, receives are posted one compute action before
their place in the plan.  Posting waits for nothing, so nothing can come to wait for it; and a send
whose receive is there already leaves at once, where gloo otherwise needs an answer first, for which
a sender that computes has no processor.  With one hardware queue everything behind a receive that
cannot start waits for it: there the plan says where receives stand, and nothing is moved.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron_dip.costs import ItemSize
from megatron_dip.errors import PlanError
from megatron_dip.partition import Stage
from megatron_dip.plan import Action, ActionType, Message, Work
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime.boundary import BoundaryOf, MessageShapes
from megatron_dip.workload import SubMicrobatch

__all__ = ["Operand", "RankProgram", "Source", "Task", "Transfer", "posted_early", "rank_program"]


class Source(NamedTuple):
    """A message that a forward reads."""

    message: Message
    sub_microbatch: SubMicrobatch
    """The one whose output it is."""
    sizes: tuple[ItemSize, ...]
    """Of its items."""
    gradient: Message | None
    """What goes back for it; None where nothing trainable made it."""


class Task(NamedTuple):
    """One work of the rank: its forward, and its backward in one or two parts."""

    work: Work
    stage: Stage
    sub_microbatch: SubMicrobatch
    sizes: tuple[ItemSize, ...]
    """Of its items."""
    sources: tuple[Source, ...]
    outputs: tuple[Message, ...]
    output_grads: tuple[Message, ...]
    """What the backward waits for: of the messages that its outputs are, one each."""
    local_sources: tuple[Work, ...]
    """Works of the rank whose outputs are sources."""
    recompute_layers: tuple[int, ...]
    offload_layers: tuple[int, ...]
    is_loss: bool
    has_backward: bool
    has_weight_grad: bool


class Transfer(NamedTuple):
    """One message to or from another rank."""

    message: Message
    peer: int
    """The rank at the other end."""
    shape: tuple[int, ...]


Operand = Task | Transfer | Stage
"""Of computing, of a send or a receive, of a gradient reduction."""


class RankProgram(NamedTuple):
    """The actions of one rank, in the order in which it runs them."""

    steps: tuple[tuple[Action, Operand], ...]
    num_readers: Mapping[Message, int]
    """Forwards of this rank that read a message, where it is more than one."""


def rank_program(batch: PlannedBatch, rank: int, boundary: BoundaryOf) -> RankProgram:
    """What ``rank`` does under the plan of ``batch``.

    Raises:
        PlanError: An action is of nothing that is in the batch.
        DataError: The items of a message have no common shape.
    """
    plan = batch.plan
    graph = plan.graph
    shapes = MessageShapes(batch, boundary)
    tasks: dict[Work, Task] = {}

    def operand(action: Action) -> Operand:
        if action.type is ActionType.REDUCE_GRAD:
            return graph.partition[action.stage]
        if action.peer is not None:
            message = Message.of(action)
            return Transfer(message, graph.partition[action.peer].rank, shapes.of(message))
        assert action.microbatch is not None
        work = Work(action.stage, action.microbatch, action.sub)
        if work not in tasks:
            tasks[work] = _task(batch, work)
        return tasks[work]

    actions = plan.actions[rank] if plan.queues is not None else posted_early(plan.actions[rank])
    steps = tuple((action, operand(action)) for action in actions)
    readers = Counter(source.message for task in tasks.values() for source in task.sources)
    return RankProgram(steps, {message: num for message, num in readers.items() if num > 1})


def posted_early(actions: Iterable[Action]) -> list[Action]:
    """Every receive before the compute action that it follows; all else stays in order."""
    moved: list[Action] = []
    last_compute = 0
    for action in actions:
        if action.type.is_receive:
            moved.insert(last_compute, action)
            last_compute += 1
            continue
        if action.type.is_compute:
            last_compute = len(moved)
        moved.append(action)
    return moved


def _task(batch: PlannedBatch, work: Work) -> Task:
    plan = batch.plan
    graph = plan.graph
    if work not in graph.numbers:
        raise PlanError(f"{work.action(ActionType.FORWARD)} computes on nothing in this batch")
    outputs = graph.forward_outputs(work)
    has_backward = graph.has_backward(work.stage)
    sub = graph.sub_microbatch(work)
    made_by = [
        Work(message.source, message.microbatch, message.sub)
        for message in graph.forward_inputs(work)
    ]
    rank = graph.partition[work.stage].rank
    return Task(
        work=work,
        stage=graph.partition[work.stage],
        sub_microbatch=sub,
        sizes=batch.sizes_of(sub),
        sources=tuple(
            Source(
                message=message,
                sub_microbatch=read,
                sizes=batch.sizes_of(read),
                gradient=message.reverse if graph.has_backward(message.source) else None,
            )
            for message, maker in zip(graph.forward_inputs(work), made_by, strict=True)
            for read in [graph.sub_microbatch(maker)]
        ),
        outputs=outputs,
        output_grads=tuple(message.reverse for message in outputs) if has_backward else (),
        local_sources=tuple(one for one in made_by if graph.partition[one.stage].rank == rank),
        recompute_layers=plan.recomputed_layers.get(work, ()),
        offload_layers=plan.offloaded_layers.get(work, ()),
        is_loss=graph.is_loss_stage(work.stage),
        has_backward=has_backward,
        has_weight_grad=graph.has_weight_grad(work.stage),
    )
