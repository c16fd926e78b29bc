"""Cases on toy modules for the ranks of ``runtime_program.py``, and how they report."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from runtime_suites import PATIENCE_S
from toy_modules import WIDTH, Case, build_stages

from megatron_dip.costs import Boundary
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import Plan, QueueModel, parse_actions, pipeline_channels
from megatron_dip.planner import make_plan
from megatron_dip.runtime import (
    Channels,
    Executor,
    ForwardCall,
    ModuleRunner,
    create_channel_groups,
)

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


def plan_of(case: Case, queues: QueueModel | None = None) -> Plan:
    return make_plan(case.problem(2), partition_of(case), max_tokens=case.max_tokens, queues=queues)


def without(plan: Plan, action: str) -> Plan:
    """The plan with one action of rank 0 left out."""
    assert action in map(str, plan.actions[0])
    kept = " ".join(str(a) for a in plan.actions[0] if str(a) != action)
    return replace(plan, actions=(parse_actions(kept), *plan.actions[1:]))


def new_channels(
    pipeline: list[int] | None = None, limit_s: float = PATIENCE_S, num_communicators: int = 1
) -> Channels:
    """Channels of their own for every case: a failure leaves messages behind."""
    pipelines = [[0, 1]] if pipeline is None else [[0, 1], [2, 3]]
    own = pipelines[rank() // 2]
    channels = pipeline_channels(partition_of(CASE), UPSTREAM)
    return Channels(
        rank=rank() % 2,
        pipeline=own,
        groups=create_channel_groups(
            channels, pipelines, limit_s, num_communicators=num_communicators
        ),
        device=torch.device("cpu"),
        timeout_seconds=limit_s,
    )


def runner_of(rank: int, case: Case = CASE, **options: Any) -> ModuleRunner:
    stages = build_stages(case, partition_of(case).stages_on(rank))
    return ModuleRunner(stages, case.rows(), **options)


def executor_of(channels: Channels, dtype: torch.dtype = torch.float64) -> Executor:
    """``dtype`` is what receivers expect; the stages put out 64 bits."""
    return Executor(
        rank=channels.rank,
        channels=channels,
        boundary=lambda module, *, outer: Boundary("packed", WIDTH),
        dtype=dtype,
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


def failing_runner(rank: int, fail: Callable[[], Any]) -> ModuleRunner:
    """Fails in rank 1's second forward of the vision module."""
    stages = build_stages(CASE, partition_of(CASE).stages_on(rank))
    return Failing(1, 1, fail, stages=stages, data=CASE.rows())
