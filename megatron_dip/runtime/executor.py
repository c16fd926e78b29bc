"""The executor: runs one rank's actions of a plan.

It consults neither clock nor planner nor arguments: plan, runner and channels in, gradients out.
A handler per action type; what an action needs of the plan (messages, shapes, items) stands beside
it in the rank's program.  Messages within one rank never meet a channel: they are handed over in
memory.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from megatron_dip.errors import DataError, DipError, ExecutionError, PlanError
from megatron_dip.partition import Stage
from megatron_dip.plan import Action, ActionType, Message, Plan, Work
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime.boundary import BoundaryOf
from megatron_dip.runtime.channels import Channels, Receive
from megatron_dip.runtime.offload import Offloader
from megatron_dip.runtime.offload_actions import OffloadActions
from megatron_dip.runtime.program import Operand, RankProgram, Task, Transfer, rank_program
from megatron_dip.runtime.reductions import ReductionQueue
from megatron_dip.runtime.runner import ForwardCall, SavedForward, StageInput, StageRunner
from megatron_dip.runtime.timeline import Recorder

__all__ = ["Executor"]

_SHOWN_ACTIONS = 4
_FORWARD_TYPES = frozenset({ActionType.FORWARD, ActionType.SEND_FORWARD, ActionType.RECV_FORWARD})


class Executor:
    """Runs plans on one rank.

    Args:
        rank: Pipeline rank.
        channels: Transfers to the other ranks.
        boundary: The boundaries of all modules: shapes of what is received.
        dtype: Of all that is sent and received.
    """

    def __init__(
        self, *, rank: int, channels: Channels, boundary: BoundaryOf, dtype: torch.dtype
    ) -> None:
        self.rank = rank
        self.channels = channels
        self.dtype = dtype
        self.offloader = Offloader(channels.device)
        self._boundary = boundary
        self._prepared: tuple[Plan, RankProgram] | None = None

    @property
    def last_plan(self) -> Plan | None:
        """The plan that was run, or prepared to be run, last."""
        return None if self._prepared is None else self._prepared[0]

    def prepare(self, batch: PlannedBatch) -> RankProgram:
        """What this rank does under a plan; kept until it is asked for another plan.

        Raises:
            PlanError: The plan is not one for its batch.
            DataError: The items of a message have no common shape.
        """
        if self._prepared is None or self._prepared[0] is not batch.plan:
            self._prepared = (batch.plan, rank_program(batch, self.rank, self._boundary))
        return self._prepared[1]

    def run(
        self,
        batch: PlannedBatch,
        runner: StageRunner,
        recorder: Recorder | None = None,
        *,
        forward_only: bool = False,
    ) -> None:
        """Execute this rank's actions; returns when all are done and all sends have ended.

        Args:
            batch: What to run; the same on all ranks.
            runner: How stages compute.
            recorder: Where spans of computing and waiting are added.
            forward_only: Run the forwards alone, and keep nothing for backwards.

        Raises:
            PlanError: The plan is not one for its batch.
            ExecutionError: An action failed; its message shows the action within the schedule.
                Or something that was made or received was not used by any action.
            ChannelError: A send did not end within the time limit, or an earlier run failed.
        """
        self.channels.check_usable()
        queues = batch.plan.queues
        try:
            self.channels.begin(1 if queues is None else queues.communicators)
            steps = self.prepare(batch).steps
            if forward_only:
                steps = tuple(step for step in steps if step[0].type in _FORWARD_TYPES)
            link = batch.plan.problem.host_link
            self.offloader.most_bytes = 0 if link is None else link.memory_bytes[self.rank]
            run = _PlanRun(self, batch, runner, recorder or Recorder(), forward_only)
            run.coming.extend(
                task
                for action, task in steps
                if action.type is ActionType.FORWARD and isinstance(task, Task)
            )
            with torch.set_grad_enabled(not forward_only):
                self._run_steps(run, steps)
            run.reductions.finish()
            self.channels.drain()
            run.check_nothing_left()
        except DipError as error:
            self.channels.abandon(str(error))
            raise

    def _run_steps(self, run: "_PlanRun", steps: tuple[tuple[Action, Operand], ...]) -> None:
        handlers = run.handlers()
        for number, (action, operand) in enumerate(steps):
            try:
                handlers[action.type](action, operand)
            except Exception as error:
                actions = [step[0] for step in steps]
                raise ExecutionError(
                    f"rank {self.rank}, step {number} of {len(steps)}, {action}: {error}\n"
                    f"  {_format_around(actions, number)}"
                ) from error


class _PlanRun:
    """The state of one plan while it runs on one rank."""

    def __init__(
        self,
        executor: Executor,
        batch: PlannedBatch,
        runner: StageRunner,
        recorder: Recorder,
        forward_only: bool,
    ) -> None:
        self.rank = executor.rank
        self.channels = executor.channels
        self.dtype = executor.dtype
        self.partition = batch.plan.partition
        self.runner = runner
        self.recorder = recorder
        self.forward_only = forward_only
        self.coming: deque[Task] = deque()
        """Works whose forwards are still to come, the next one first."""
        self.stash: dict[Work, SavedForward] = {}
        self.offloads = OffloadActions(executor.offloader, self.stash, recorder)
        self.receives: dict[Message, Receive] = {}
        """Posted and not yet waited for."""
        self.tensors: dict[Message, torch.Tensor] = {}
        """Arrived, or made here, and not yet sent or read by all of its readers; a gradient sums
        up here until its last contributor is done."""
        self.reductions = ReductionQueue(one_at_a_time=batch.plan.queues is not None)
        self.unread = dict(executor.prepare(batch).num_readers)
        """Readers to come, of messages that had more than one."""

    def handlers(self) -> Mapping[ActionType, Callable[[Action, Any], None]]:
        """Every handler gets an action and what the program says of it."""
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
            **self.offloads.handlers(),
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
            "tensors not read by all": [
                str(message.receive) for message in self.tensors if not self._is_sent(message)
            ],
            "tensors never sent": [
                str(message.send) for message in self.tensors if self._is_sent(message)
            ],
        }
        found = [f"{what}: {' '.join(names)}" for what, names in left.items() if names]
        if found:
            raise ExecutionError(
                f"rank {self.rank}: the plan ended with {'; '.join(found)} (this is no "
                f"valid plan: check it with 'megatron-dip validate')"
            )

    def _is_sent(self, message: Message) -> bool:
        return self.partition[message.target].rank != self.rank

    # ---- computing --------------------------------------------------------------------------

    def forward(self, action: Action, task: Task) -> None:
        keeps_graph = task.has_backward and not self.forward_only
        inputs = []
        for source in task.sources:
            # A leaf of its own for every reader, so that their gradients stay apart.
            leaf = self._take(source.message, action).detach()
            leaf.requires_grad_(keeps_graph and source.gradient is not None)
            inputs.append(StageInput(source.sub_microbatch, source.sizes, leaf))
        call = ForwardCall(
            work=task.work,
            stage=task.stage,
            sub_microbatch=task.sub_microbatch,
            sizes=task.sizes,
            inputs=tuple(inputs),
            recompute_layers=task.recompute_layers,
            offload=self.offloads.start(task) if keeps_graph else None,
            is_loss=task.is_loss,
        )
        start = self.recorder.begin()
        with nullcontext() if keeps_graph else torch.no_grad():
            output = self.runner.forward(call)
        self.recorder.record(action, start)
        if keeps_graph:
            self.stash[task.work] = SavedForward(call=call, output=output)
        for message in task.outputs:
            self.tensors[message] = output.detach()
        self.channels.retire_completed()
        self.reductions.advance()
        self.coming.popleft()
        if self.coming:
            # The host prepares it while the device computes.
            coming = self.coming[0]
            self.runner.prepare(coming.work, coming.stage, coming.sub_microbatch)

    def backward(self, action: Action, task: Task) -> None:
        output_grad = self._output_grad(action, task)
        saved = self.stash.pop(task.work)
        self._end_sends(task)
        self.runner.release_output(saved)
        self.offloads.await_reload(action, saved)
        start = self.recorder.begin()
        grads = []
        if task.is_loss or output_grad is not None:
            grads = self.runner.backward(saved, output_grad)
        self.recorder.record(action, start)
        self.offloads.end(saved)
        self._contribute(task, saved, grads)
        self.reductions.advance()

    def input_grad(self, action: Action, task: Task) -> None:
        if not task.has_weight_grad:
            # Frozen layers have no second half: this is all of their backward.
            self.backward(action, task)
            return
        saved = self.stash[task.work]
        saved.output_grad = self._output_grad(action, task)
        self._end_sends(task)
        self.runner.release_output(saved)
        self.offloads.await_reload(action, saved)
        start = self.recorder.begin()
        grads = []
        if task.is_loss or saved.output_grad is not None:
            grads = self.runner.input_grad(saved, saved.output_grad)
        self.recorder.record(action, start)
        self.offloads.end(saved)
        self._contribute(task, saved, grads)

    def weight_grad(self, action: Action, task: Task) -> None:
        saved = self.stash.pop(task.work)
        start = self.recorder.begin()
        if task.is_loss or saved.output_grad is not None:
            self.runner.weight_grad(saved)
        self.recorder.record(action, start)

    def reduce_grad(self, action: Action, stage: Stage) -> None:
        self.reductions.add(self.runner.reductions(stage))

    # ---- transfers --------------------------------------------------------------------------

    def send(self, action: Action, transfer: Transfer) -> None:
        message = transfer.message
        tensor = self.tensors.pop(message)
        # Sent, it would end the receiving process, or be taken for something else.
        if tensor.shape != transfer.shape:
            raise DataError(
                f"{message.send} would send {list(tensor.shape)} but the plan says "
                f"{list(transfer.shape)}: the metadata of microbatch {message.microbatch} is not "
                f"that of its data (make the data set's index again)"
            )
        if tensor.dtype != self.dtype:
            raise DataError(
                f"{message.send} would send {tensor.dtype} but its receiver expects "
                f"{self.dtype} (a stage must put out the type of the run; look for options "
                f"that keep hidden states in 32 bits)"
            )
        self.channels.send(message, transfer.peer, tensor)

    def receive(self, action: Action, transfer: Transfer) -> None:
        message, peer, shape = transfer
        self.receives[message] = self.channels.post_receive(message, peer, shape, self.dtype)

    def _take(self, message: Message, reader: Action) -> torch.Tensor:
        """The tensor of ``message``, waited for if it is still on its way."""
        if message not in self.tensors:
            if message not in self.receives:
                raise PlanError(f"{message.receive} was never posted")
            start = self.recorder.begin()
            self.tensors[message] = self.channels.wait_receive(self.receives.pop(message))
            self.recorder.record(reader, start, is_wait=True)
        left = self.unread.get(message, 1) - 1
        if left:
            self.unread[message] = left
            return self.tensors[message]
        return self.tensors.pop(message)

    def _end_sends(self, task: Task) -> None:
        # The gradient is on its way back, so the output has arrived: these waits return at once.
        for message in task.outputs:
            self.channels.wait_send(message)

    # ---- gradients --------------------------------------------------------------------------

    def _output_grad(self, reader: Action, task: Task) -> torch.Tensor | None:
        """The gradient of a work's output, summed over the modules that read it."""
        total: torch.Tensor | None = None
        for message in task.output_grads:
            grad = self._take(message, reader)
            total = grad if total is None else total + grad
        return total

    def _contribute(
        self, task: Task, saved: SavedForward, grads: list[torch.Tensor | None]
    ) -> None:
        """Add gradients of inputs to the messages that go back; whole when all readers have."""
        for index, source in enumerate(task.sources):
            if source.gradient is None:
                continue
            grad = grads[index] if grads else None
            if grad is None:
                # A stage may leave an input unread, a text-only sequence for one.
                grad = torch.zeros_like(saved.call.inputs[index].tensor)
            so_far = self.tensors.get(source.gradient)
            self.tensors[source.gradient] = grad if so_far is None else so_far + grad


def _format_around(actions: Sequence[Action], step: int) -> str:
    """The schedule around ``step``, with that action marked."""
    first, last = max(0, step - _SHOWN_ACTIONS), step + _SHOWN_ACTIONS + 1
    shown = [
        f">>{action}<<" if first + index == step else str(action)
        for index, action in enumerate(actions[first:last])
    ]
    return " ".join(["..."] * (first > 0) + shown + ["..."] * (last < len(actions)))
