"""One rank of the executor's equality test: toy modules under a plan against a plain loop.

Started by ``test_executor.py``; all cases of one number of ranks run in one process group.  As in
training, only the first and the last rank of a pipeline have data: the others learn from the plan
what crosses their boundaries.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from toy_modules import WIDTH, Case, ToyStage, build_stages, plain_loop

from megatron_dip.costs import Boundary
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import (
    Action,
    ActionType,
    Offload,
    Plan,
    QueueModel,
    Recompute,
    Work,
    pipeline_channels,
)
from megatron_dip.planner import make_plan, pack_plan
from megatron_dip.runtime import (
    Channels,
    Executor,
    ModuleRunner,
    PlanAgreement,
    create_channel_groups,
)

TOLERANCE = 1e-12
_CPU = torch.device("cpu")

CASES: dict[int, list[Case]] = {
    1: [
        Case(
            name="everything on one rank: no message crosses a channel",
            upstream={"vision": (), "language": ("vision",)},
            batch=[{"vision": [4, 8], "language": [6, 5]}, {"vision": [], "language": [7]}],
            cut={"vision": [[1], [1]], "language": [[1], [2]]},
            max_tokens={"vision": 8, "language": 6},
            offload=True,
        ),
    ],
    2: [
        Case(
            name="vision and language, one segment, text-only microbatch",
            upstream={"vision": (), "language": ("vision",)},
            batch=[
                {"vision": [4, 8], "language": [6, 5]},
                {"vision": [], "language": [7]},
                {"vision": [4, 4, 4], "language": [3, 9]},
            ],
            cut={"vision": [[1, 1]], "language": [[2, 1]]},
        ),
        Case(
            name="two segments, sub-microbatches, needs, 1F1B",
            upstream={"vision": (), "language": ("vision",)},
            batch=[
                {"vision": [4, 8, 2], "language": [6, 5]},
                {"vision": [4], "language": [7, 2]},
                {"vision": [4, 4, 4], "language": [3, 9]},
            ],
            cut={"vision": [[1, 1], [1, 1]], "language": [[1, 1], [1, 0]]},
            max_tokens={"vision": 6, "language": 6},
            needs={("language", 0, 0): {"vision": (0, 2)}, ("language", 0, 1): {"vision": (1, 2)}},
            algorithm="one_f_one_b",
        ),
        Case(
            name="frozen encoder, split backward",
            upstream={"text": (), "dit": ("text",)},
            batch=[{"text": [3, 3], "dit": [5]}, {"text": [2], "dit": [8]}] * 2,
            cut={"text": [[1, 1]], "dit": [[1, 1], [1, 1]]},
            frozen=("text",),
            split_backward=True,
        ),
        Case(
            name="projector alone, before a frozen language; a microbatch without images",
            upstream={"vision": (), "language": ("vision",)},
            batch=[
                {"vision": [4, 8], "language": [6, 5]},
                {"vision": [], "language": [7]},
                {"vision": [4, 2], "language": [3, 9]},
            ],
            cut={"vision": [[2, 1], [1, 0]], "language": [[1, 1], [0, 1]]},
            frozen=("language",),
            parts={"vision": ((), True)},
            max_tokens={"vision": 6, "language": 6},
        ),
        Case(
            name="last layer of the tower, last layer and projector of language",
            upstream={"vision": (), "language": ("vision",)},
            batch=[{"vision": [4, 8], "language": [6, 5]}, {"vision": [], "language": [7]}],
            cut={"vision": [[2, 2]], "language": [[2, 1]]},
            parts={"vision": (((3, 4),), False), "language": (((2, 3),), True)},
            split_backward=True,
            recompute=True,
        ),
        Case(
            name="frozen tower, and of language the last layer alone",
            upstream={"vision": (), "language": ("vision",)},
            batch=[{"vision": [4], "language": [6, 5]}, {"vision": [3], "language": [7]}],
            cut={"vision": [[1, 1]], "language": [[1, 2], [1, 1]]},
            frozen=("vision",),
            parts={"language": (((4, 5),), False)},
            split_backward=True,
            offload=True,
        ),
    ],
    4: [
        Case(
            name="fan-in of two encoders, frozen language, skipped ranks, recompute",
            upstream={"vision": (), "audio": (), "language": ("vision", "audio")},
            batch=[
                {"vision": [4, 8], "audio": [3], "language": [6, 5]},
                {"vision": [], "audio": [], "language": [7]},
                {"vision": [4], "audio": [], "language": [3, 9]},
                {"vision": [], "audio": [2, 2], "language": [8]},
            ],
            cut={
                "vision": [[1, 0, 1, 1]],
                "audio": [[0, 1, 1, 0]],
                "language": [[1, 1, 1, 1], [0, 1, 0, 0]],
            },
            frozen=("language",),
            max_tokens={"vision": 4, "language": 6},
            recompute=True,
        ),
        Case(
            name="two segments each, many microbatches",
            upstream={"vision": (), "language": ("vision",)},
            batch=[{"vision": [4] * (number % 4), "language": [5, 6]} for number in range(8)],
            cut={"vision": [[1, 1, 1, 1]], "language": [[1, 1, 1, 1], [1, 1, 1, 0]]},
            max_tokens={"vision": 8, "language": 6},
            split_backward=True,
            recompute=True,
            offload=True,
        ),
    ],
}


def packed_plan(
    case: Case, num_ranks: int, partition: Partition, queues: QueueModel | None
) -> bytes:
    problem = case.problem(num_ranks)
    plan = make_plan(
        problem,
        partition,
        algorithm=case.algorithm,
        max_tokens={name: case.max_tokens.get(name) for name in case.upstream},
        split_backward=case.split_backward,
        queues=queues,
    )
    return pack_plan(_with_layers(plan, case), [case.sizes()])


def _with_layers(plan: Plan, case: Case) -> Plan:
    """``plan`` with all layers recomputed, or moved to the host as long as they can be."""
    recompute, offload = [], []
    for work in plan.graph.works:
        layers = tuple(plan.graph.backwards[work.stage].layers)
        repeated = (layers[::2] if case.offload else layers) if case.recompute else ()
        moved = tuple(set(layers) - set(repeated)) if case.offload else ()
        recompute += [Recompute(*work, repeated)] if repeated else []
        offload += [Offload(*work, moved)] if moved else []
    works = {Work(*one[:3]) for one in offload}
    actions = tuple(tuple(_with_copies(one, works)) for one in plan.actions)
    return replace(plan, recompute=tuple(recompute), offload=tuple(offload), actions=actions)


def _with_copies(actions: Iterable[Action], works: Collection[Work]) -> Iterator[Action]:
    """Each work away from right after its forward to right before its backward."""
    for action in actions:
        work = Work(action.stage, action.microbatch or 0, action.sub)
        is_moved = action.type.is_compute and work in works
        if is_moved and action.type in (ActionType.BACKWARD, ActionType.INPUT_GRAD):
            yield work.action(ActionType.RELOAD)
        yield action
        if is_moved and action.type is ActionType.FORWARD:
            yield work.action(ActionType.OFFLOAD)
            yield work.action(ActionType.RELEASE)


def run_case(
    case: Case,
    num_ranks: int,
    num_tensor_ranks: int = 1,
    queues: QueueModel | None = None,
    *,
    device: torch.device = _CPU,
    backend: str | None = None,
) -> float:
    """Pipelines of ``num_ranks``: ranks of a tensor-parallel group run the same, each in its own,
    and only the first of them has data.

    Args:
        queues: What the plan is made for.
        device: Where stages compute; the plain loop is the CPU's.
        backend: Of the channels, as in ``torch.distributed.new_group``.

    Returns:
        The largest relative error of this rank's gradients.
    """
    partition = partition_from_layers(case.cut, num_ranks)
    rank, tensor_rank = divmod(dist.get_rank(), num_tensor_ranks)
    pipelines = [
        [number * num_tensor_ranks + peer for number in range(num_ranks)]
        for peer in range(num_tensor_ranks)
    ]
    has_data = rank in (0, num_ranks - 1) and tensor_rank == 0
    agreement = PlanAgreement(partition, dist.group.WORLD)
    planned = agreement.agree(
        case.sizes() if has_data else None,
        lambda sizes: case.problem(num_ranks),
        lambda: packed_plan(case, num_ranks, partition, queues),
    )
    plan, pipeline = planned.plan, pipelines[tensor_rank]
    groups = create_channel_groups(
        pipeline_channels(partition, case.upstream),
        pipelines,
        30.0,
        backend,
        num_communicators=1 if queues is None else queues.communicators,
    )
    channels = Channels(
        rank=rank,
        pipeline=pipeline,
        groups=groups,
        device=device,
        timeout_seconds=30.0,
    )
    channels.connect()
    stages = {
        number: stage.to(device)
        for number, stage in build_stages(case, partition.stages_on(rank)).items()
    }
    # First stages read rows, and are on the first rank.
    rows = {key: rows.to(device) for key, rows in case.rows().items()} if rank == 0 else {}
    runner = ModuleRunner(stages, rows)
    executor = Executor(
        rank=rank,
        channels=channels,
        boundary=lambda module, *, outer: Boundary("packed", WIDTH),
        dtype=torch.float64,
    )
    executor.run(planned, runner, forward_only=True)
    forward_losses = dict(runner.losses)
    executor.run(planned, runner)
    assert runner.losses == forward_losses, "evaluation and training must see the same loss"
    moves = any(action.type is ActionType.OFFLOAD for action in plan.actions[rank])
    assert (executor.offloader.moved_bytes > 0) == moves
    assert executor.offloader.blocks.bytes_in_use == 0
    expected_loss, expected = plain_loop(case, plan.problem, partition)
    if rank == num_ranks - 1:
        loss = sum(float(loss) for loss in runner.losses.values())
        assert abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss), (loss, expected_loss)
    worst = largest_error(stages, expected)
    assert worst <= TOLERANCE, f"{case.name}: relative error {worst}"
    num_actions = len(plan.actions[rank])
    print(f"rank {rank}: {case.name}: within {worst:.1e}, {num_actions} actions", flush=True)
    return worst


def largest_error(
    stages: dict[int, ToyStage], expected: dict[tuple[int, str], torch.Tensor | None]
) -> float:
    """Relative to the largest gradient of each parameter."""
    worst = 0.0
    for number, stage in stages.items():
        for name, parameter in stage.named_parameters():
            wanted = expected[number, name]
            if wanted is None:
                assert parameter.grad is None, f"stage {number} has a gradient for {name}"
                continue
            assert parameter.grad is not None, f"stage {number} has no gradient for {name}"
            error = (parameter.grad.cpu() - wanted).abs().max() / wanted.abs().max()
            worst = max(worst, float(error))
    return worst


def main() -> None:
    num_processes = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in CASES[num_processes]:
        run_case(case, num_processes)
    # Receives where the plan says, and the last case's messages on three groups in turn.
    run_case(CASES[num_processes][-1], num_processes, queues=QueueModel(communicators=3))
    if num_processes == 4:
        run_case(CASES[2][1], num_ranks=2, num_tensor_ranks=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
