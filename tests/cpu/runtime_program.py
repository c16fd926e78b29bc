"""One rank of the runtime's failure tests, on toy modules; see the tests that start it.

    python runtime_program.py SUITE

A suite runs all its cases in one process group, to spare starts, and prints one JSON line per
case: its name, how it ended, the message and the seconds it took.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from runtime_agreement import agreement_suite
from runtime_cases import (
    CASE,
    UPSTREAM,
    executor_of,
    failing_runner,
    new_channels,
    partition_of,
    plan_of,
    rank,
    report,
    runner_of,
    without,
)
from runtime_suites import LIMIT_S, PATIENCE_S
from toy_modules import Case, build_stages, plain_loop

from megatron_dip.partition import Stage
from megatron_dip.plan import Message, QueueModel, parse_actions
from megatron_dip.planner import PlannedBatch
from megatron_dip.runtime import Channels, ModuleRunner, Reduction

# ---- channels -------------------------------------------------------------------------------


def messages(*microbatches: int, is_gradient: bool = False) -> list[Message]:
    source, target = (1, 0) if is_gradient else (0, 1)
    return [Message(source, target, number, 0, is_gradient) for number in microbatches]


def rows(message: Message) -> torch.Tensor:
    return torch.full((message.microbatch + 1, 2), float(message.microbatch), dtype=torch.float64)


def exchange(send_first: bool) -> list[list[float]]:
    """Rank 0 sends three outputs while rank 1 sends three gradients; what arrives, in order."""
    channels = new_channels()
    outputs, gradients = messages(0, 1, 2), messages(3, 4, 5, is_gradient=True)
    outgoing, incoming = (outputs, gradients) if rank() == 0 else (gradients, outputs)
    peer = 1 - rank()

    def send() -> None:
        for message in outgoing:
            channels.send(message, peer, rows(message))

    if send_first:
        send()
    receives = [
        channels.post_receive(message, peer, tuple(rows(message).shape), torch.float64)
        for message in incoming
    ]
    if not send_first:
        send()
    # Waiting in another order than posting changes nothing in who gets what.
    arrived = {r.message: channels.wait_receive(r) for r in reversed(receives)}
    channels.drain()
    return [arrived[message].flatten().tolist() for message in incoming]


def silent_sender() -> None:
    channels = new_channels(limit_s=LIMIT_S)
    try:
        if rank() == 1:
            (message,) = messages(7)
            channels.wait_receive(channels.post_receive(message, 0, (1, 2), torch.float64))
    finally:
        # Until the wait has ended, the silent one is there.
        dist.barrier()


def silent_receiver() -> None:
    channels = new_channels(limit_s=LIMIT_S)
    try:
        if rank() == 0:
            (message,) = messages(7)
            channels.send(message, 1, rows(message))
            channels.drain()
    finally:
        dist.barrier()


def lazy_communicators(*, connected: bool, queues: QueueModel | None = None) -> None:
    """A plan where, as NCCL does it, the first transfer of a group waits for its other end."""
    channels = new_channels(
        limit_s=LIMIT_S if not connected else PATIENCE_S,
        num_communicators=1 if queues is None else queues.communicators,
    )
    store, met = dist.distributed_c10d._get_default_store(), set()

    def meeting(transfer: Callable[..., Any]) -> Callable[..., Any]:
        def transfer_when_met(tensor: torch.Tensor, *, group: Any, **options: Any) -> Any:
            if group.group_name not in met:
                met.add(group.group_name)
                store.set(f"{group.group_name} {rank()}", "here")
                store.wait([f"{group.group_name} {1 - rank()}"], channels._timeout)
            return transfer(tensor, group=group, **options)

        return transfer_when_met

    with patch.multiple(dist, isend=meeting(dist.isend), irecv=meeting(dist.irecv)):
        if connected:
            channels.connect()
        run_case(channels, runner_of(rank()), queues)


def channels_suite() -> None:
    report("lazy, connected", lambda: lazy_communicators(connected=True))
    one_queue = QueueModel(communicators=2)
    report("lazy, one queue", lambda: lazy_communicators(connected=True, queues=one_queue))
    report("too few", lambda: run_case(new_channels(), runner_of(rank()), one_queue))
    report("lazy, not connected", lambda: lazy_communicators(connected=False))
    report("receives posted first", lambda: exchange(send_first=False))
    report("sends posted first", lambda: exchange(send_first=True))
    report("silent sender", silent_sender)
    report("silent receiver", silent_receiver)


# ---- executor -------------------------------------------------------------------------------


def run_case(
    channels: Channels, runner: ModuleRunner, queues: QueueModel | None = None, **options: Any
) -> None:
    executor_of(channels, **options).run(PlannedBatch(plan_of(CASE, queues)), runner)


def missing_send() -> list[str]:
    """A plan without one send, run twice; the two messages of this rank."""
    channels = new_channels(limit_s=LIMIT_S)
    plan = without(plan_of(CASE), "0SEND_F1>1")
    found = []
    for _ in range(2):
        try:
            executor_of(channels).run(PlannedBatch(plan), runner_of(rank()))
        except Exception as error:
            found.append(f"{type(error).__name__} from {type(error.__cause__).__name__}: {error}")
    return found


def forward_only() -> dict[str, Any]:
    """What is left of an evaluation: by the runner and by the channels."""
    channels = new_channels()
    runner = runner_of(rank())
    executor_of(channels).run(PlannedBatch(plan_of(CASE)), runner, forward_only=True)
    parameters = [p for stage in runner._stages.values() for p in stage.parameters()]
    return {
        "gradients": sum(p.grad is not None for p in parameters),
        "in_flight": len(channels._in_flight),
        "graphs": sum(loss.requires_grad for loss in runner.losses.values()),
        "losses": len(runner.losses),
    }


def leftover() -> None:
    """A plan without backwards: no action fails, but all forwards wait for one."""
    plan = plan_of(CASE)
    kept = [" ".join(str(a) for a in actions if "F" in str(a)) for actions in plan.actions]
    cut = replace(plan, actions=tuple(parse_actions(line) for line in kept))
    executor_of(new_channels()).run(PlannedBatch(cut), runner_of(rank()))


def raising(error: Exception) -> None:
    def fail() -> None:
        raise error

    # The other rank finds out when its wait ends.
    run_case(new_channels(limit_s=LIMIT_S), failing_runner(rank(), fail))


def executor_suite() -> None:
    report("missing send", missing_send)
    report("raising action", lambda: raising(ZeroDivisionError("a bug in the model")))
    report("forward only", forward_only)
    report("leftover", leftover)
    report(
        "other type",
        lambda: run_case(new_channels(limit_s=LIMIT_S), runner_of(rank()), dtype=torch.float32),
    )
    report("afterwards", lambda: run_case(new_channels(), runner_of(rank())))
    # Last, because rank 1 does not come back.
    channels = new_channels()
    report("death", lambda: run_case(channels, failing_runner(rank(), lambda: os._exit(3))))


# ---- data-parallel replicas -----------------------------------------------------------------


REPLICAS = [
    Case(
        name="images",
        upstream=UPSTREAM,
        batch=[
            {"vision": [4, 8], "language": [6, 5]},
            {"vision": [2], "language": [7]},
            {"vision": [4, 4, 4], "language": [3, 9]},
        ],
        cut={"vision": [[1, 1]], "language": [[1, 1], [1, 1]]},
        max_tokens={"vision": 8, "language": 6},
    ),
    Case(
        name="text only",
        upstream=UPSTREAM,
        batch=[{"vision": [], "language": [5]}, {"vision": [], "language": [3, 3, 8]}],
        cut={"vision": [[1, 1]], "language": [[1, 1], [1, 1]]},
        max_tokens={"language": 3},
    ),
]


class Watched(ModuleRunner):
    """Notes which reductions run when another one starts."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.started: list[tuple[int, list[int]]] = []

    def reductions(self, stage: Stage) -> Sequence[Reduction]:
        return [_WatchedReduction(self, stage.stage, one) for one in super().reductions(stage)]


class _WatchedReduction:
    """Ends when it was asked three times: the answer to ``is_completed`` is a matter of luck."""

    def __init__(self, runner: Watched, stage: int, reduction: Reduction) -> None:
        self.runner, self.stage, self.reduction = runner, stage, reduction
        self.asked = 0

    def start(self) -> None:
        running = [one.stage for one in _running if one.asked < 3]
        self.runner.started.append((self.stage, running))
        _running.append(self)
        self.reduction.start()

    def is_ended(self) -> bool:
        self.asked += 1
        return self.asked >= 3


_running: list[_WatchedReduction] = []


def replicas(queues: QueueModel | None = None) -> dict[str, Any]:
    """Two pipelines with different batches; the largest error against the mean of plain loops."""
    replica = rank() // 2
    data_parallel = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank() % 2]
    case = REPLICAS[replica]
    channels = new_channels([0, 1], num_communicators=2)
    stages = build_stages(case, partition_of(case).stages_on(channels.rank))
    runner = Watched(stages, case.rows(), data_parallel_group=data_parallel)
    plan = plan_of(case, queues)
    _running.clear()
    executor_of(channels).run(PlannedBatch(plan), runner)
    runner.finish_reductions()
    expected = [plain_loop(c, c.problem(2), partition_of(c))[1] for c in REPLICAS]
    worst = 0.0
    for number, stage in runner._stages.items():
        for name, parameter in stage.named_parameters():
            parts = [one[number, name] for one in expected]
            mean = sum(torch.zeros_like(parameter) if p is None else p for p in parts) / 2
            assert parameter.grad is not None
            error = (parameter.grad - mean).abs().max() / mean.abs().max()
            worst = max(worst, float(error))
    actions = [str(action) for action in plan.actions[channels.rank]]
    return {
        "worst": worst,
        "reduces": [a for a in actions if "REDUCE" in a],
        "actions": actions,
        "started": runner.started,
        "asked": [one.asked for one in _running],
    }


def replicas_suite() -> None:
    report("replicas", replicas)
    report("replicas, one queue", lambda: replicas(QueueModel(communicators=2)))


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # Compiled code is loaded before anything is timed.
    plan_of(CASE)
    suites = {
        "channels": channels_suite,
        "agreement": agreement_suite,
        "executor": executor_suite,
        "replicas": replicas_suite,
    }
    suites[sys.argv[1]]()
    sys.stdout.flush()
    # Threads of process groups that were broken on purpose may abort an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()
