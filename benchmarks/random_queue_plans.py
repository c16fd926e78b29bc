"""Random plans for one hardware queue, each proven by validation: how many can hang?

Small problems with random modules, cuts, times and transfers; plans by 1F1B, by the dual queue with
and without a search, of joint problems, and in orders drawn at random.

    python benchmarks/random_queue_plans.py [--count 10000] [--seed 0]
"""

import argparse
import time
from typing import Any

import numpy as np

from megatron_dip.errors import PlanDeadlockError
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import PipelineGraph, Plan, QueueModel
from megatron_dip.plan.numbers import decode_tasks, number_actions
from megatron_dip.plan.progress import hosts_meet
from megatron_dip.plan.queues import ActionLists
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import form_sub_microbatches, make_plan, plan_from_order
from megatron_dip.planner.joint import joint_problem
from megatron_dip.simulator import TaskTable, build_task_table
from megatron_dip.workload import Problem, parse_problem

COMMUNICATORS = (1, 2, 4)

GRAPHS: tuple[tuple[tuple[str, tuple[str, ...], bool], ...], ...] = (
    (("language", (), True),),
    (("vision", (), True), ("language", ("vision",), True)),
    (("vision", (), False), ("language", ("vision",), True)),
    (("vision", (), True), ("language", ("vision",), False)),
    (("vision", (), True), ("audio", (), False), ("language", ("vision", "audio"), True)),
    (("vision", (), True), ("text", ("vision",), False), ("dit", ("text", "vision"), True)),
)


def random_problem(random: np.random.Generator) -> tuple[Problem, Partition]:
    """Some modules on some ranks in some segments, items of all sizes, slow and fast transfers."""
    num_ranks = int(random.integers(2, 6))
    modules = GRAPHS[random.integers(len(GRAPHS))]
    layers = {
        name: random.integers(0, 3, (random.integers(1, 4), num_ranks)).tolist()
        for name, _, _ in modules
    }
    for cut in layers.values():
        cut[0][0] += not any(map(sum, cut))

    def item(number: int) -> dict[str, Any]:
        forward_us, grad_us, weight_us = random.choice([0.0, 0.5, 1.0, 3.0, 10.0], 3).tolist()
        return {
            "item": number,
            "tokens": int(random.integers(1, 4)),
            "forward_us": forward_us,
            "input_grad_us": grad_us,
            "weight_grad_us": weight_us,
            "activation_bytes": 1,
            "boundary_bytes": int(random.integers(0, 9)),
        }

    last = modules[-1][0]
    microbatches = [
        {
            name: [item(number) for number in range(random.integers(0 if name != last else 1, 4))]
            for name, _, _ in modules
        }
        for _ in range(random.integers(1, 9))
    ]
    problem = parse_problem(
        {
            "num_ranks": num_ranks,
            "memory_limit_bytes": [10**15] * num_ranks,
            "transfer": {
                "latency_us": float(random.choice([0.0, 0.25, 2.0])),
                "bytes_per_us": float(random.choice([0.5, 3.0, 1e12])),
            },
            "modules": [
                {
                    "name": name,
                    "num_layers": sum(map(sum, layers[name])),
                    "upstream": list(upstream),
                    "trainable": trainable,
                    "layer_overhead_us": float(random.choice([0.0, 0.5])),
                    "layer_static_bytes": 1,
                }
                for name, upstream, trainable in modules
            ],
            "microbatches": microbatches,
        }
    )
    return problem, partition_from_layers(layers, num_ranks)


def random_order(table: TaskTable, random: np.random.Generator, split: bool) -> list[list[int]]:
    """Any order that respects dependencies: ready actions drawn at random."""
    graph = table.split if split else table.whole
    num_waiting = graph.num_inputs.copy()
    ready = np.flatnonzero(graph.exists & (num_waiting == 0)).tolist()
    ranks: list[list[int]] = [[] for _ in range(table.num_ranks)]
    while ready:
        task = ready.pop(int(random.integers(len(ready))))
        ranks[graph.rank[task % table.num_works]].append(task)
        for edge in range(graph.first_output[task], graph.first_output[task + 1]):
            follower = graph.output[edge]
            num_waiting[follower] -= 1
            if num_waiting[follower] == 0:
                ready.append(int(follower))
    return ranks


def random_plan(random: np.random.Generator) -> Plan:
    """By any planner, or in any order; validated by whoever makes it."""
    problem, partition = random_problem(random)
    queues = QueueModel(communicators=int(random.choice(COMMUNICATORS)))
    maker = random.integers(4)
    split = bool(random.integers(2))
    if maker == 0:
        return make_plan(
            problem, partition, algorithm="one_f_one_b", split_backward=split, queues=queues
        )
    limits = {name: int(random.integers(1, 5)) for name in problem.module_order}
    if maker == 1:
        return make_plan(
            problem,
            partition,
            max_tokens=limits,
            evaluations=int(random.integers(1, 40)),
            split_backward=split,
            queues=queues,
        )
    if maker == 2:
        return make_plan(joint_problem([problem]), partition, max_tokens=limits, queues=queues)
    graph = PipelineGraph(problem, partition, form_sub_microbatches(problem, limits))
    table = build_task_table(graph)
    ranks = random_order(table, random, split)
    actions = [decode_tasks(graph, np.array(line, dtype=np.int64)) for line in ranks]
    return plan_from_order(graph, actions, queues=queues)


def check_random_plans(count: int, seed: int) -> str:
    """How many of so many random plans can hang, under one queue or at first uses."""
    random = np.random.default_rng(seed)
    started, hanging, actions, early_hanging, not_meeting = time.monotonic(), 0, 0, 0, 0
    for _ in range(count):
        try:
            plan = random_plan(random)
            validate_plan(plan)
        except PlanDeadlockError:
            hanging += 1
            continue
        actions += sum(map(len, plan.actions))
        early_hanging += hangs_when_early(plan)
        numbers = number_actions(plan.graph, plan.actions)
        lists = ActionLists(numbers.first, numbers.rank, numbers.type, numbers.number)
        assert plan.queues is not None
        not_meeting += not hosts_meet(plan.graph.wiring, lists, plan.queues.communicators)
    return (
        f"{hanging} of {count} random plans (seed {seed}, {actions:,} actions) can hang with one "
        f"hardware queue; with all receives first {early_hanging} would, and at first uses of "
        f"channels that are not opened before {not_meeting} ({time.monotonic() - started:.0f} s)"
    )


def hangs_when_early(plan: Plan) -> bool:
    """The same plan with the receives of every rank before everything else."""
    early = tuple(
        tuple(sorted(line, key=lambda action: not action.type.is_receive)) for line in plan.actions
    )
    try:
        validate_plan(
            Plan.of_graph(plan.graph, early, recompute=plan.recompute, queues=plan.queues)
        )
    except PlanDeadlockError:
        return True
    return False


def main() -> None:
    """Print how many hang."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(check_random_plans(arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
