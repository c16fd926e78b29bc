"""The executor: runs one rank's actions of a plan.

It consults neither clock nor planner nor arguments: plan, runner and channels in, gradients out.
A handler per action type; what an action needs (messages, shapes, items) is asked of the plan's
graph.  Messages within one rank never meet a channel: they are handed over in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_dip.errors import DataError, DipError, ExecutionError, PlanError
from megatron_dip.plan import Action, ActionType, Message, Plan, Work
from megatron_dip.runtime.boundary import BoundaryRules, message_shape
from megatron_dip.runtime.channels import Channels, Receive, Send
from megatron_dip.runtime.runner import ForwardCall, SavedForward, StageInput, StageRunner
from megatron_dip.runtime.timeline import Recorder

__all__ = ["Executor"]

_SHOWN_ACTIONS = 4
_FORWARD_TYPES = frozenset({ActionType.FORWARD, ActionType.SEND_FORWARD, ActionType.RECV_FORWARD})


class Executor:
    """Runs plans on one rank.

    Args:
        rank: Pipeline rank.
        runner: How stages compute.
        channels: Transfers to the other ranks.
        boundaries: Shapes of what is received.
        recorder: Where spans of computing and waiting are added.
    """

    def __init__(
        self,
        *,
        rank: int,
        runner: StageRunner,
        channels: Channels,
        boundaries: BoundaryRules,
        recorder: Recorder | None = None,
    ) -> None:
        self.rank = rank
        self.runner = runner
        self.channels = channels
        self.boundaries = boundaries
        self.recorder = recorder or Recorder()

    def run(self, plan: Plan, *, forward_only: bool = False) -> None:
        """Execute this rank's actions; returns when all are done and all sends have ended.

        Raises:
            ExecutionError: An action failed; its message shows the action within the schedule.
                Or something that was made or received was not used by any action.
            ChannelError: A send did not end within the time limit, or an earlier run failed.
        """
        self.channels.check_usable()
        run = _PlanRun(self, plan, forward_only)
        actions = plan.actions[self.rank]
        if forward_only:
            actions = tuple(action for action in actions if action.type in _FORWARD_TYPES)
        try:
            self._run_actions(run, actions)
            self.channels.drain()
            run.check_nothing_left()
        except DipError as error:
            self.channels.abandon(str(error))
            raise

    def _run_actions(self, run: "_PlanRun", actions: tuple[Action, ...]) -> None:
        handlers = run.handlers()
        for step, action in enumerate(actions):
            try:
                handlers[action.type](action)
            except Exception as error:
                raise ExecutionError(
                    f"rank {self.rank}, step {step} of {len(actions)}, {action}: {error}\n"
                    f"  {_format_around(actions, step)}"
                ) from error


@dataclass
class _PlanRun:
    """The state of one plan while it runs on one rank."""

    executor: Executor
    plan: Plan
    forward_only: bool
    stash: dict[Work, SavedForward] = field(default_factory=dict)
    receives: dict[Message, Receive] = field(default_factory=dict)
    """Posted and not yet waited for."""
    inbox: dict[Message, torch.Tensor] = field(default_factory=dict)
    """Arrived, or made on this rank, and not yet read by all of its readers."""
    unread: dict[Message, int] = field(default_factory=dict)
    outbox: dict[Message, torch.Tensor] = field(default_factory=dict)
    """Made, to be sent; a gradient sums up here until its last contributor is done."""
    sends: dict[Work, list[Send]] = field(default_factory=dict)
    """Sends of a forward's output, to be ended before its memory is freed."""

    def handlers(self) -> Mapping[ActionType, Callable[[Action], None]]:
        return {
            ActionType.FORWARD: self.forward,
            ActionType.BACKWARD: self.backward,
            ActionType.INPUT_GRAD: self.input_grad,
            ActionType.WEIGHT_GRAD: self.weight_grad,
            ActionType.SEND_FORWARD: self.send,
            ActionType.SEND_BACKWARD: self.send,
            ActionType.RECV_FORWARD: self.receive,
            ActionType.RECV_BACKWARD: self.receive,
            ActionType.REDUCE_GRAD: self.reduce_grad,
        }

    def check_nothing_left(self) -> None:
        """Every tensor of the run is used up; a plan that validates leaves none.

        Raises:
            ExecutionError: Names what is left.
        """
        left = {
            "forwards without backward": [
                str(work.action(ActionType.FORWARD)) for work in self.stash
            ],
            "receives never read": [str(message.receive) for message in self.receives],
            "tensors not read by all": [str(message.receive) for message in self.inbox],
            "tensors never sent": [str(message.send) for message in self.outbox],
        }
        found = [f"{what}: {' '.join(names)}" for what, names in left.items() if names]
        if found:
            raise ExecutionError(
                f"rank {self.executor.rank}: the plan ended with {'; '.join(found)} (this is no "
                f"valid plan: check it with 'megatron-dip validate')"
            )

    # ---- computing --------------------------------------------------------------------------

    def forward(self, action: Action) -> None:
        graph = self.plan.graph
        work = _work_of(action)
        keeps_graph = graph.has_backward(work.stage) and not self.forward_only
        inputs = []
        for message in graph.forward_inputs(work):
            tensor = self._take(message, action)
            # A leaf of its own for every reader, so that their gradients stay apart.
            leaf = tensor.detach()
            leaf.requires_grad_(keeps_graph and graph.has_backward(message.source))
            source = Work(message.source, message.microbatch, message.sub)
            inputs.append(StageInput(graph.sub_microbatch(source), leaf))
        stage = graph.partition[work.stage]
        call = ForwardCall(
            work=work,
            stage=stage,
            sub_microbatch=graph.sub_microbatch(work),
            inputs=tuple(inputs),
            recompute_layers=self.plan.recomputed_layers.get(work, ()),
            is_loss=graph.is_loss_stage(work.stage),
        )
        start = self.executor.recorder.begin()
        with torch.set_grad_enabled(keeps_graph):
            output = self.executor.runner.forward(call)
        self.executor.recorder.record(action, start)
        if keeps_graph:
            self.stash[work] = SavedForward(call=call, output=output)
        for message in graph.forward_outputs(work):
            self._put(message, output.detach())
        self.executor.channels.retire_completed()

    def backward(self, action: Action) -> None:
        work = _work_of(action)
        output_grad = self._output_grad(work, action)
        saved = self._unstash(work)
        start = self.executor.recorder.begin()
        grads = []
        if saved.call.is_loss or output_grad is not None:
            grads = self.executor.runner.backward(saved, output_grad)
        self.executor.recorder.record(action, start)
        self._contribute(saved, grads)

    def input_grad(self, action: Action) -> None:
        work = _work_of(action)
        if not self.plan.graph.has_weight_grad(work.stage):
            # Frozen layers have no second half: this is all of their backward.
            self.backward(action)
            return
        saved = self.stash[work]
        saved.output_grad = self._output_grad(work, action)
        self._end_sends(work)
        start = self.executor.recorder.begin()
        grads = []
        if saved.call.is_loss or saved.output_grad is not None:
            grads = self.executor.runner.input_grad(saved, saved.output_grad)
        self.executor.recorder.record(action, start)
        self._contribute(saved, grads)

    def weight_grad(self, action: Action) -> None:
        saved = self.stash.pop(_work_of(action))
        start = self.executor.recorder.begin()
        if saved.call.is_loss or saved.output_grad is not None:
            self.executor.runner.weight_grad(saved)
        self.executor.recorder.record(action, start)

    def reduce_grad(self, action: Action) -> None:
        self.executor.runner.reduce_grad(self.plan.graph.partition[action.stage])

    # ---- transfers --------------------------------------------------------------------------

    def send(self, action: Action) -> None:
        message = Message.of(action)
        graph = self.plan.graph
        receiver = graph.partition[message.target].rank
        tensor = self.outbox.pop(message)
        planned, _ = message_shape(graph, message, self.executor.boundaries)
        if tensor.shape != planned:
            # Sent, it would end the receiving process, or be taken for something else.
            raise DataError(
                f"{message.send} would send {list(tensor.shape)} but the plan says "
                f"{list(planned)}: the metadata of microbatch {message.microbatch} is not that of "
                f"its data (make the data set's index again)"
            )
        send = self.executor.channels.send(message, receiver, tensor)
        work = Work(message.source, message.microbatch, message.sub)
        # Without a backward there is nothing that would wait for the end of the send.
        if not message.is_gradient and work in self.stash:
            self.sends.setdefault(work, []).append(send)

    def receive(self, action: Action) -> None:
        message = Message.of(action)
        graph = self.plan.graph
        shape, dtype = message_shape(graph, message, self.executor.boundaries)
        sender = graph.partition[message.source].rank
        self.receives[message] = self.executor.channels.post_receive(message, sender, shape, dtype)

    def _take(self, message: Message, reader: Action) -> torch.Tensor:
        """The tensor of ``message``, waited for if it is still on its way."""
        if message not in self.inbox:
            if message not in self.receives:
                raise PlanError(f"{message.receive} was never posted")
            start = self.executor.recorder.begin()
            self.inbox[message] = self.executor.channels.wait_receive(self.receives.pop(message))
            self.executor.recorder.record(reader, start, is_wait=True)
        left = self.unread.get(message, len(self.plan.graph.readers(message))) - 1
        if left:
            self.unread[message] = left
            return self.inbox[message]
        self.unread.pop(message, None)
        return self.inbox.pop(message)

    def _put(self, message: Message, tensor: torch.Tensor) -> None:
        """Hand over what this rank has made."""
        crosses = self.plan.graph.crosses_ranks(message)
        (self.outbox if crosses else self.inbox)[message] = tensor

    # ---- gradients --------------------------------------------------------------------------

    def _output_grad(self, work: Work, reader: Action) -> torch.Tensor | None:
        """The gradient of a work's output, summed over the modules that read it."""
        total: torch.Tensor | None = None
        for message in self.plan.graph.backward_inputs(work):
            grad = self._take(message, reader)
            total = grad if total is None else total + grad
        return total

    def _contribute(self, saved: SavedForward, grads: list[torch.Tensor | None]) -> None:
        """Add gradients of inputs to the messages back, and hand over those that are complete."""
        graph = self.plan.graph
        for index, message in enumerate(graph.forward_inputs(saved.call.work)):
            if not graph.has_backward(message.source):
                continue
            grad = grads[index] if grads else None
            if grad is None:
                # A stage may leave an input unread, a text-only sequence for one.
                grad = torch.zeros_like(saved.call.inputs[index].tensor)
            back = message.reverse
            so_far = self.outbox.pop(back, None)
            if so_far is None:
                so_far = self.inbox.pop(back, None)
            self._put(back, grad if so_far is None else so_far + grad)

    def _unstash(self, work: Work) -> SavedForward:
        saved = self.stash.pop(work)
        self._end_sends(work)
        self.executor.runner.release_output(saved)
        return saved

    def _end_sends(self, work: Work) -> None:
        # The gradient is on its way back, so the output has arrived: these waits return at once.
        for send in self.sends.pop(work, ()):
            self.executor.channels.wait_send(send)


def _work_of(action: Action) -> Work:
    assert action.microbatch is not None
    return Work(action.stage, action.microbatch, action.sub)


def _format_around(actions: tuple[Action, ...], step: int) -> str:
    """The schedule around ``step``, with that action marked."""
    first, last = max(0, step - _SHOWN_ACTIONS), step + _SHOWN_ACTIONS + 1
    shown = [
        f">>{action}<<" if first + index == step else str(action)
        for index, action in enumerate(actions[first:last])
    ]
    return " ".join(["..."] * (first > 0) + shown + ["..."] * (last < len(actions)))
