"""One rank of the runtime's failure tests, on toy modules; see the tests that start it.

    python runtime_program.py SUITE

A suite runs all its cases in one process group, to spare starts, and prints one JSON line per
case: its name, how it ended, the message and the seconds it took.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from toy_modules import WIDTH, Case, build_stages, plain_loop

from megatron_dip.costs import ItemSize
from megatron_dip.errors import ConfigError
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Message, Plan, pack_plan, parse_actions
from megatron_dip.planner import joint_problem, make_plan
from megatron_dip.runtime import (
    BoundaryRule,
    BoundaryRules,
    Channels,
    Executor,
    ForwardCall,
    ModuleRunner,
    PlanAgreement,
    create_channel_groups,
    pipeline_channels,
)
from megatron_dip.workload import Problem

LIMIT_S = 1.0
UPSTREAM: dict[str, tuple[str, ...]] = {"vision": (), "language": ("vision",)}
CASE = Case(
    name="two ranks, two microbatches",
    upstream=UPSTREAM,
    batch=[{"vision": [4], "language": [6]}, {"vision": [8], "language": [7]}],
    cut={"vision": [[1, 1]], "language": [[1, 1]]},
)
OTHER_CUT = {"vision": [[1, 1]], "language": [[2, 0], [0, 0]]}


def rank() -> int:
    return dist.get_rank()


def report(name: str, run: Callable[[], Any]) -> None:
    """Run a case; ``outcome`` is "ok" or the type of its exception."""
    dist.barrier()
    start = time.monotonic()
    record: dict[str, Any] = {"case": name, "outcome": "ok", "message": "", "cause": ""}
    try:
        record["result"] = run()
    except Exception as error:
        record |= {"outcome": type(error).__name__, "message": str(error)}
        record["cause"] = type(error.__cause__).__name__
    record["seconds"] = time.monotonic() - start
    print(json.dumps(record), flush=True)


def partition_of(case: Case) -> Partition:
    return partition_from_layers(case.cut, 2)


def plan_of(case: Case) -> Plan:
    return make_plan(case.problem(2), partition_of(case), max_tokens=case.max_tokens)


def without(plan: Plan, action: str) -> Plan:
    """The plan with one action of rank 0 left out."""
    assert action in map(str, plan.actions[0])
    kept = " ".join(str(a) for a in plan.actions[0] if str(a) != action)
    return replace(plan, actions=(parse_actions(kept), *plan.actions[1:]))


def new_channels(pipeline: list[int] | None = None, limit_s: float = LIMIT_S) -> Channels:
    """Channels of their own for every case: a failure leaves messages behind."""
    pipelines = [[0, 1]] if pipeline is None else [[0, 1], [2, 3]]
    own = pipelines[rank() // 2]
    channels = pipeline_channels(partition_of(CASE), UPSTREAM)
    return Channels(
        rank=rank() % 2,
        pipeline=own,
        groups=create_channel_groups(channels, pipelines, limit_s),
        device=torch.device("cpu"),
        timeout_seconds=limit_s,
    )


def executor_of(channels: Channels, case: Case = CASE, **options: Any) -> Executor:
    stages = build_stages(case, partition_of(case).stages_on(channels.rank))
    rules = {name: BoundaryRule(width=WIDTH, dtype=torch.float64) for name in UPSTREAM}
    return Executor(
        rank=channels.rank,
        runner=ModuleRunner(stages, case.rows(), **options),
        channels=channels,
        boundaries=BoundaryRules(inner=rules, outer=rules),
    )


class Failing(ModuleRunner):
    """Fails in one forward."""

    def __init__(self, stage: int, microbatch: int, fail: Callable[[], Any], **options: Any):
        super().__init__(**options)
        self._at, self._fail = (stage, microbatch), fail

    def forward(self, call: ForwardCall) -> torch.Tensor:
        if (call.work.stage, call.work.microbatch) == self._at:
            self._fail()
        return super().forward(call)


def failing_executor(channels: Channels, fail: Callable[[], Any]) -> Executor:
    """Fails in rank 1's second forward of the vision module."""
    executor = executor_of(channels)
    stages = build_stages(CASE, partition_of(CASE).stages_on(channels.rank))
    executor.runner = Failing(1, 1, fail, stages=stages, data=CASE.rows())
    return executor


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
    channels = new_channels()
    if rank() == 1:
        (message,) = messages(7)
        channels.wait_receive(channels.post_receive(message, 0, (1, 2), torch.float64))
    else:
        time.sleep(1.5 * LIMIT_S)


def silent_receiver() -> None:
    channels = new_channels()
    if rank() == 0:
        (message,) = messages(7)
        channels.send(message, 1, rows(message))
        channels.drain()
    else:
        time.sleep(1.5 * LIMIT_S)


def channels_suite() -> None:
    report("receives posted first", lambda: exchange(send_first=False))
    report("sends posted first", lambda: exchange(send_first=True))
    report("silent sender", silent_sender)
    report("silent receiver", silent_receiver)


# ---- agreement ------------------------------------------------------------------------------

Make = Callable[[Problem, Partition], Plan]

OTHER_BATCH = replace(CASE, batch=[*CASE.batch[:1], {"vision": [9], "language": [7]}])


class Agreeing:
    """One pipeline's agreement as this rank sees it; counts the plans that the owner makes."""

    def __init__(
        self,
        case: Case = CASE,
        cut: dict[str, list[list[int]]] | None = None,
        make: Make = make_plan,
    ) -> None:
        group = dist.new_group([0, 1], timeout=timedelta(seconds=LIMIT_S), backend="gloo")
        self.problem = case.problem(2)
        self.partition = partition_from_layers(cut or case.cut, 2)
        self.agreement = PlanAgreement(self.partition, group)
        self.num_made = 0
        self._make = make

    def made(self) -> bytes:
        self.num_made += 1
        return pack_plan(self._make(self.problem, self.partition))

    def agree(self, problem: Problem | None = None) -> str:
        """The plan's time and text."""
        plan = self.agreement.agree(problem or self.problem, self.made)
        assert plan.estimate is not None
        return f"{plan.estimate.makespan_us} us\n{plan.to_text()}"

    def offer(self, packed: bytes) -> None:
        self.agreement.offer(packed)


def offered() -> list[Any]:
    """Plans that came ahead: used without making one, and again when a step is run again."""
    one = Agreeing()
    one.offer(one.made())
    texts = [one.agree(), one.agree()]
    # Nothing yet; then one that is longer than there is room for, which makes room.
    one.offer(b"")
    one.agreement._capacity_bytes = 8
    one.problem = OTHER_BATCH.problem(2)
    other = one.made()
    one.offer(other)
    texts.append(one.agree())
    one.problem = CASE.problem(2)
    one.offer(one.made())
    texts.append(one.agree())
    return [one.num_made, texts]


def offered_out_of_turn() -> list[Any]:
    """An evaluation comes between an offer and its use."""
    one = Agreeing()
    training, evaluation = one.problem, OTHER_BATCH.problem(2)
    one.offer(one.made())
    one.problem = evaluation
    texts = [one.agree(evaluation), one.agree(training)]
    return [one.num_made, texts]


def offered_to_another_batch() -> str:
    """Rank 1 is not where rank 0 is in its data."""
    one = Agreeing()
    one.offer(one.made())
    return one.agree(OTHER_BATCH.problem(2) if rank() == 1 else None)


def offered_with_damage() -> str:
    """Rank 1 gets what was offered with one byte changed."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.agreement._collect()
        (received,) = one.agreement._offered
        packed = received.packed
        received.packed = packed[:20] + bytes([packed[20] ^ 1]) + packed[21:]
    return one.agree()


def differing_plan() -> str:
    """Rank 1 holds another correct plan for the same batch."""
    one = Agreeing()
    one.offer(one.made())
    if rank() == 1:
        one.agreement._collect()
        (received,) = one.agreement._offered
        received.packed = pack_plan(
            make_plan(one.problem, one.partition, algorithm="one_f_one_b", split_backward=True)
        )
    return one.agree()


def shared(lies: bool = False) -> list[Any]:
    """Two replicas of a rank each: the second reads a microbatch without images, or ``lies``."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=LIMIT_S), backend="gloo")
    agreement = PlanAgreement(partition_of(CASE), group, leaders=(0, 1), replica=rank())
    text_only = replace(CASE, batch=[CASE.batch[0], {"language": [7]}])
    problems = [CASE.problem(2), text_only.problem(2)]
    sizes = ({"language": [ItemSize(tokens=rank(), spans=(rank(),))]},)
    gathered = agreement.gather([sizes])
    told = [[batch[0]["language"][0].tokens for batch in shares] for shares in gathered]

    def make() -> bytes:
        plan = make_plan(joint_problem(problems), partition_of(CASE))
        return pack_plan(plan, [problem.batch_digest() for problem in problems])

    plan = agreement.agree(problems[0 if lies else rank()], make)
    return [told, plan.to_text()]


def fail_with(error: Exception) -> Make:
    def make(*_: Any) -> Plan:
        raise error

    return make


def sleep(*_: Any) -> Plan:
    time.sleep(2.5 * LIMIT_S)
    return plan_of(CASE)


def agreement_suite() -> None:
    report("same everywhere", lambda: Agreeing().agree())
    report("another batch", lambda: Agreeing(OTHER_BATCH if rank() == 1 else CASE).agree())
    report("another partition", lambda: Agreeing(cut=OTHER_CUT if rank() == 1 else None).agree())
    report("offered", offered)
    report("offered out of turn", offered_out_of_turn)
    report("offered to another batch", offered_to_another_batch)
    report("offered with damage", offered_with_damage)
    report("differing plan", differing_plan)
    report("shared", shared)
    report("shared, another batch", lambda: shared(lies=True))
    refusal = ConfigError("no planner for this")
    report("planner refuses", lambda: Agreeing(make=fail_with(refusal)).agree())
    report(
        "planner has a bug", lambda: Agreeing(make=fail_with(ZeroDivisionError("a bug"))).agree()
    )
    report("afterwards", lambda: Agreeing().agree())
    report("planner is stuck", lambda: Agreeing(make=sleep).agree())


# ---- executor -------------------------------------------------------------------------------


def missing_send() -> list[str]:
    """A plan without one send, run twice; the two messages of this rank."""
    channels = new_channels()
    plan = without(plan_of(CASE), "0SEND_F1>1")
    found = []
    for _ in range(2):
        try:
            executor_of(channels).run(plan)
        except Exception as error:
            found.append(f"{type(error).__name__} from {type(error.__cause__).__name__}: {error}")
    return found


def forward_only() -> dict[str, Any]:
    """What is left of an evaluation: by the runner and by the channels."""
    channels = new_channels()
    executor = executor_of(channels)
    executor.run(plan_of(CASE), forward_only=True)
    assert isinstance(executor.runner, ModuleRunner)
    parameters = [p for stage in executor.runner._stages.values() for p in stage.parameters()]
    return {
        "gradients": sum(p.grad is not None for p in parameters),
        "in_flight": len(channels._in_flight),
        "graphs": sum(loss.requires_grad for loss in executor.runner.losses.values()),
        "losses": len(executor.runner.losses),
    }


def leftover() -> None:
    """A plan without backwards: no action fails, but all forwards wait for one."""
    plan = plan_of(CASE)
    kept = [" ".join(str(a) for a in actions if "F" in str(a)) for actions in plan.actions]
    cut = replace(plan, actions=tuple(parse_actions(line) for line in kept))
    executor_of(new_channels()).run(cut)


def raising(error: Exception) -> None:
    def fail() -> None:
        raise error

    failing_executor(new_channels(), fail).run(plan_of(CASE))


def executor_suite() -> None:
    report("missing send", missing_send)
    report("raising action", lambda: raising(ZeroDivisionError("a bug in the model")))
    report("forward only", forward_only)
    report("leftover", leftover)
    report("afterwards", lambda: executor_of(new_channels()).run(plan_of(CASE)))
    # Last, because rank 1 does not come back.
    channels = new_channels(limit_s=20.0)
    report("death", lambda: failing_executor(channels, lambda: os._exit(3)).run(plan_of(CASE)))


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


def replicas() -> dict[str, Any]:
    """Two pipelines with different batches; the largest error against the mean of plain loops."""
    replica = rank() // 2
    data_parallel = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank() % 2]
    case = REPLICAS[replica]
    channels = new_channels([0, 1], limit_s=20.0)
    executor = executor_of(channels, case, data_parallel_group=data_parallel)
    plan = plan_of(case)
    executor.run(plan)
    runner = executor.runner
    assert isinstance(runner, ModuleRunner)
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
    return {"worst": worst, "reduces": [a for a in actions if "REDUCE" in a], "actions": actions}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # Compiled code is loaded before anything is timed.
    plan_of(CASE)
    suites = {
        "channels": channels_suite,
        "agreement": agreement_suite,
        "executor": executor_suite,
        "replicas": lambda: report("replicas", replicas),
    }
    suites[sys.argv[1]]()
    sys.stdout.flush()
    # Threads of process groups that were broken on purpose may abort an orderly end.
    os._exit(0)


if __name__ == "__main__":
    main()
