"""What one hardware queue per rank costs, by the means that are taken against it; and proofs.

Reads the test problems of a folder (``*-test-*.json``), plans them with as many microbatches as
``--microbatches`` says, and lets the plans run in the model of ``megatron_dip.plan.queues``.  Time
is over that with many hardware queues, as the planner reckons it:

- *early*: every receive one compute action before the place where lowering puts it;
- *in order*: where lowering puts it;
- *first reader*: behind the first reader of the one before it on its communicator;
- *placed*: as plans for one queue are made;
- *priority*: receives and sends have a queue of their own, as streams of high priority would if a
  priority had one: it is not known whether it has;
- *noise*: the placed plan where every action takes another time than was planned (log-normal, one
  in ten), over the plan for many queues under the same noise.

Means of all problems of a model; ``hang`` where some come to rest for ever.  Batched neighbours are
left out: one kernel for two transfers ends with the later one, so that it only adds to what is
waited for.

    python benchmarks/queue_model.py FOLDER [--microbatches 64] [--evaluations 64]
    python benchmarks/queue_model.py --random 10000 [--seed 0]
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from planner_speed import kept_partition, model_of, resized
from rich.console import Console
from rich.table import Table

from megatron_dip.errors import PlanDeadlockError
from megatron_dip.partition import load_partition, partition_from_layers
from megatron_dip.plan import PipelineGraph, Plan, QueueModel
from megatron_dip.plan.lowering import lower_lists
from megatron_dip.plan.numbers import TYPE_NUMBERS, decode_tasks, number_actions
from megatron_dip.plan.placing import place_receives, rearranged
from megatron_dip.plan.progress import hosts_meet
from megatron_dip.plan.queues import ActionLists, list_kernels, run_kernels
from megatron_dip.plan.validation import validate_plan
from megatron_dip.plan.wiring import FloatArray, IntArray
from megatron_dip.planner import form_sub_microbatches, make_plan, plan_from_order, search_schedule
from megatron_dip.planner.joint import joint_problem
from megatron_dip.simulator import TaskTable, build_task_table, simulate_order
from megatron_dip.simulator.simulate import decode_order, list_durations_us
from megatron_dip.workload import Problem, load_problem, parse_problem

COMMUNICATORS = (1, 2, 4)
NOISE = 0.1
_SEND_F, _RECV_F, _SEND_B, _RECV_B = (TYPE_NUMBERS[kind] for kind in list(TYPE_NUMBERS)[4:8])


# ---- the means -----------------------------------------------------------------------------------


class Lists(NamedTuple):
    """One plan, as lowering makes it."""

    table: TaskTable
    lists: ActionLists
    duration_us: FloatArray

    def takes_us(self, order: IntArray, communicators: int, duration_us: FloatArray) -> float:
        """With one queue; infinite where it hangs."""
        kernels = list_kernels(
            self.table.graph.wiring, rearranged(self.lists, order), communicators
        )
        times = run_kernels(kernels, duration_us[order])
        return float(times.ends_us.max()) if times.is_done.all() else math.inf

    def in_order(self, _: int) -> IntArray:
        return np.arange(len(self.duration_us))

    def early(self, _: int) -> IntArray:
        """As the executor posts receives where every stream has a queue."""
        order: list[int] = []
        for start, end in zip(self.lists.first[:-1], self.lists.first[1:], strict=True):
            line: list[int] = []
            last = 0
            for action in range(start, end):
                kind = self.lists.type[action]
                if kind in (_RECV_F, _RECV_B):
                    line.insert(last, action)
                    last += 1
                    continue
                last = len(line) if kind < _SEND_F else last
                line.append(action)
            order += line
        return np.array(order)

    def first_reader(self, communicators: int) -> IntArray:
        """Behind the first reader of the one before it, or where it was if that is later."""
        kernels = list_kernels(self.table.graph.wiring, self.lists, communicators)
        place = np.arange(len(self.duration_us), dtype=float)
        for receive in np.flatnonzero(np.isin(self.lists.type, (_RECV_F, _RECV_B))):
            before = kernels.before[receive]
            if before >= 0:
                reader = kernels.waiting[kernels.first_waiting[before]]
                place[receive] = max(place[receive], reader + 0.5)
        return np.argsort(place, kind="stable")

    def placed(self, communicators: int) -> IntArray:
        return place_receives(self.table.graph.wiring, self.lists, self.duration_us, communicators)

    def priority_us(self) -> float:
        """Transfers in a queue of their own, in order: the computing waits for none that waits."""
        kernels = list_kernels(self.table.graph.wiring, self.lists, 1)
        behind = np.full(len(self.duration_us), -1)
        for rank in range(self.table.num_ranks):
            for moves in (True, False):
                here = np.flatnonzero(
                    (self.lists.rank == rank) & ((self.lists.type >= _SEND_F) == moves)
                )
                behind[here[:-1]] = here[1:]
        times = run_kernels(kernels._replace(behind=behind), self.duration_us)
        return float(times.ends_us.max()) if times.is_done.all() else math.inf

    def noisy_us(self, random: np.random.Generator) -> FloatArray:
        """Other times of the computing."""
        factor = np.exp(random.normal(0.0, NOISE, len(self.duration_us)))
        return np.where(self.lists.type < _SEND_F, self.duration_us * factor, self.duration_us)

    def many_us(self, order: IntArray, duration_us: FloatArray) -> float:
        kernels = list_kernels(
            self.table.graph.wiring,
            rearranged(self.lists, order),
            1,
            hardware_queues="many",
        )
        return float(run_kernels(kernels, duration_us[order]).ends_us.max())


def case_of(path: Path, num_microbatches: int) -> TaskTable:
    """The batch with so many microbatches, on the partition kept for its model."""
    problem = load_problem(path)
    problem = resized(problem, problem.num_ranks, num_microbatches)
    partition = load_partition(kept_partition(path.stem))
    groups = form_sub_microbatches(problem, partition.sub_microbatch_tokens)
    return build_task_table(PipelineGraph(problem, partition, groups))


def rows_of(lists: Lists, base_us: float) -> dict[tuple[str, int], float]:
    """Times over ``base_us`` by mean and number of communicators."""
    random = np.random.default_rng(0)
    noisy = lists.noisy_us(random)
    noisy_base_us = lists.many_us(lists.early(1), noisy)
    found = {("priority", 1): lists.priority_us() / base_us}
    for count in COMMUNICATORS:
        for name in ("early", "in_order", "first_reader", "placed"):
            order = getattr(lists, name)(count)
            found[name, count] = lists.takes_us(order, count, lists.duration_us) / base_us
            if name == "placed":
                found["noise", count] = lists.takes_us(order, count, noisy) / noisy_base_us
    return found


def cost_table(paths: Sequence[Path], num_microbatches: int, evaluations: int) -> Table:
    """One line per model and number of communicators."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    planned: dict[str, list[float]] = defaultdict(list)
    for path in paths:
        table = case_of(path, num_microbatches)
        schedule = search_schedule(table, evaluations=evaluations)
        table = table.with_recompute(schedule.num_recomputed)
        simulation = simulate_order(table, schedule.order)
        lowered = lower_lists(table.graph, simulation.completion_order).lists
        lists = Lists(table, lowered, list_durations_us(table, lowered))
        for (name, count), ratio in rows_of(lists, simulation.makespan_us).items():
            found[model_of(path.stem), count][name].append(ratio)
        planned[model_of(path.stem)].append(check_plan(table, schedule, simulation.makespan_us))
    names = ("early", "in_order", "first_reader", "placed", "noise", "priority")
    printed = Table("model", "communicators", *(name.replace("_", " ") for name in names), "plan")
    for (model, count), row in found.items():
        cells = [mean_of(row[name]) for name in names]
        printed.add_row(model, str(count), *cells, mean_of(planned[model]) if count == 2 else "")
    return printed


def check_plan(table: TaskTable, schedule: Any, base_us: float) -> float:
    """The whole plan for one queue with two communicators, proven; its time over ``base_us``."""
    plan = plan_from_order(
        table.graph, decode_order(table, schedule.order), queues=QueueModel(communicators=2)
    )
    assert plan.estimate is not None
    return plan.estimate.makespan_us / base_us


def mean_of(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    hangs = sum(map(math.isinf, ratios))
    return f"{hangs} of {len(ratios)} hang" if hangs else f"{statistics.mean(ratios):.4f}"


# ---- random plans --------------------------------------------------------------------------------

GRAPHS: tuple[tuple[tuple[str, tuple[str, ...], bool], ...], ...] = (
    (("language", (), True),),
    (("vision", (), True), ("language", ("vision",), True)),
    (("vision", (), False), ("language", ("vision",), True)),
    (("vision", (), True), ("language", ("vision",), False)),
    (("vision", (), True), ("audio", (), False), ("language", ("vision", "audio"), True)),
    (("vision", (), True), ("text", ("vision",), False), ("dit", ("text", "vision"), True)),
)


def random_problem(random: np.random.Generator) -> tuple[Problem, Any]:
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


def random_order(table: TaskTable, random: np.random.Generator, split: bool) -> Any:
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
    """Print the table, or the proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="folder with *-test-*.json problems")
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--evaluations", type=int, default=64, help="of the search for each plan")
    parser.add_argument("--random", type=int, help="check so many random plans instead")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.random is not None:
        print(check_random_plans(arguments.random, arguments.seed))
        return
    if arguments.folder is None:
        parser.error("expected a folder, or --random")
    paths = sorted(arguments.folder.glob("*-test-*.json"))
    if not paths:
        parser.error(f"{arguments.folder} holds no *-test-*.json problems")
    table = cost_table(paths, arguments.microbatches, arguments.evaluations)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
