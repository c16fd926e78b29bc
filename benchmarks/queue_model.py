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

    python benchmarks/queue_model.py FOLDER [--microbatches 64] [--ranks N] [--evaluations 64]
    python benchmarks/queue_model.py FOLDER --reductions

The second says what gradient reductions of two replicas with different batches add: issued where
they stand in the lists, held back until the one before has ended (seen at once, or when the host,
which is some actions ahead, has issued so many more), or all at the end.
"""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from planner_speed import kept_partition, make_table, model_of, resized
from rich.console import Console
from rich.table import Table

from megatron_dip.partition import load_partition
from megatron_dip.plan import ActionType, PipelineGraph, QueueModel
from megatron_dip.plan.lowering import lower_lists
from megatron_dip.plan.numbers import TYPE_NUMBERS
from megatron_dip.plan.placing import place_receives, rearranged
from megatron_dip.plan.queues import ActionLists, Kernels, KernelTimes, list_kernels, run_kernels
from megatron_dip.plan.wiring import FloatArray, IntArray
from megatron_dip.planner import form_sub_microbatches, plan_from_order, search_schedule
from megatron_dip.planner.greedy import GreedySchedule
from megatron_dip.planner.memory import layers_to_recompute
from megatron_dip.simulator import TaskTable, build_task_table, simulate_order
from megatron_dip.simulator.simulate import decode_order, list_durations_us
from megatron_dip.workload import load_problem

COMMUNICATORS = (1, 2, 4)
PLANNED = 2
"""What plans of a run take."""
NOISE = 0.1
BYTES_PER_US = 40000.0
"""Of a gradient reduction."""
_SEND_F, _RECV_F, _SEND_B, _RECV_B = (TYPE_NUMBERS[kind] for kind in list(TYPE_NUMBERS)[4:8])
_REDUCE = TYPE_NUMBERS[ActionType.REDUCE_GRAD]


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


def case_of(path: Path, num_microbatches: int, num_ranks: int | None) -> TaskTable:
    """The batch with so many microbatches and ranks, on the partition kept for its model if that
    has as many."""
    problem = load_problem(path)
    is_kept = num_ranks in (None, problem.num_ranks)
    problem = resized(problem, num_ranks or problem.num_ranks, num_microbatches)
    if not is_kept:
        return make_table(problem)
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


def cost_table(
    paths: Sequence[Path], num_microbatches: int, num_ranks: int | None, evaluations: int
) -> Table:
    """One line per model and number of communicators."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    planned: dict[str, list[float]] = defaultdict(list)
    for path in paths:
        table = case_of(path, num_microbatches, num_ranks)
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
        printed.add_row(
            model, str(count), *cells, mean_of(planned[model]) if count == PLANNED else ""
        )
    return printed


def check_plan(table: TaskTable, schedule: GreedySchedule, base_us: float) -> float:
    """The whole plan for one queue, proven; its time over ``base_us``."""
    plan = plan_from_order(
        table.graph,
        decode_order(table, schedule.order),
        layers_to_recompute(table, schedule.num_recomputed),
        queues=QueueModel(communicators=PLANNED),
    )
    assert plan.estimate is not None
    return plan.estimate.makespan_us / base_us


def mean_of(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    hangs = sum(map(math.isinf, ratios))
    return f"{hangs} of {len(ratios)} hang" if hangs else f"{statistics.mean(ratios):.4f}"


# ---- reductions ----------------------------------------------------------------------------------


class Replica(NamedTuple):
    """One of two replicas, its plan for one queue and when its actions run."""

    lists: ActionLists
    kernels: Kernels
    duration_us: FloatArray
    times: KernelTimes


def replica_of(table: TaskTable, evaluations: int) -> Replica:
    """With reductions of gradients that take twice their bytes over the bandwidth."""
    problem, wiring = table.graph.problem, table.graph.wiring
    schedule = search_schedule(table, evaluations=evaluations)
    table = table.with_recompute(schedule.num_recomputed)
    simulation = simulate_order(table, schedule.order)
    lists = lower_lists(table.graph, simulation.completion_order).lists
    order = place_receives(wiring, lists, list_durations_us(table, lists), PLANNED)
    lists = rearranged(lists, order)
    duration_us = list_durations_us(table, lists)
    for place, stage in enumerate(table.graph.stages):
        module = problem.module(stage.module)
        # Of 6 bytes per weight, 4 are its gradient.
        gradient = module.num_trained(stage.layers) * module.layer_static_bytes * 4 / 6
        found = (lists.type == _REDUCE) & (lists.number == place)
        duration_us[found] = problem.transfer.latency_us + 2 * gradient / BYTES_PER_US
    kernels = list_kernels(wiring, lists, PLANNED)
    return Replica(lists, kernels, duration_us, run_kernels(kernels, duration_us))


def together(pair: Sequence[Replica], *, one_queue: bool) -> float:
    """Both replicas with every reduction issued where it stands, each with its own on the other."""
    offset = len(pair[0].duration_us)
    joined = {
        name: np.concatenate(
            [getattr(pair[0].kernels, name), _shifted(getattr(pair[1].kernels, name), offset)]
        )
        for name in ("rank", "before", "after", "behind", "other_side", "waiting")
    }
    ended = [
        np.repeat(np.arange(len(one.duration_us)), np.diff(one.kernels.first_waiting))
        for one in pair
    ]
    edges = [np.concatenate([ended[0], ended[1] + offset]), joined["waiting"]]
    reduces = []
    for number, one in enumerate(pair):
        types, first = one.lists.type, number * offset
        computing = np.maximum.accumulate(np.where(types < _SEND_F, np.arange(len(types)), -1))
        found = np.flatnonzero(types == _REDUCE)
        # Behind what is in the current stream when it is issued, as NCCL does it.
        edges[0] = np.concatenate([edges[0], computing[found] + first])
        edges[1] = np.concatenate([edges[1], found + first])
        same = one.lists.rank[found[1:]] == one.lists.rank[found[:-1]]
        joined["before"][found[1:][same] + first] = found[:-1][same] + first
        joined["after"][found[:-1][same] + first] = found[1:][same] + first
        reduces.append(found + first)
    joined["other_side"][reduces[0]] = reduces[1]
    joined["other_side"][reduces[1]] = reduces[0]
    if not one_queue:
        joined["behind"][:] = -1
    by_ended = np.argsort(edges[0], kind="stable")
    total = offset + len(pair[1].duration_us)
    joined["waiting"] = edges[1][by_ended]
    kernels = Kernels(
        first_waiting=np.searchsorted(edges[0][by_ended], np.arange(total + 1)), **joined
    )
    duration_us = np.concatenate([one.duration_us for one in pair])
    times = run_kernels(kernels, duration_us)
    return float(times.ends_us.max()) if times.is_done.all() else math.inf


def _shifted(values: IntArray, offset: int) -> IntArray:
    return np.where(values >= 0, values + offset, values)


def held_back(pair: Sequence[Replica], num_actions_ahead: int | None) -> float:
    """Reductions that hold up nothing: each issued when the one before it has ended, so many
    actions later as the host is ahead; at the end of the plan where that is None."""
    end_us = max(float(one.times.ends_us.max()) for one in pair)
    for rank in range(int(pair[0].lists.rank.max()) + 1):
        reductions = [
            np.flatnonzero((p.lists.rank == rank) & (p.lists.type == _REDUCE)) for p in pair
        ]
        free_us = 0.0
        for places in zip(*reductions, strict=True):
            issued = [
                _issued_us(one, place, free_us, num_actions_ahead)
                for one, place in zip(pair, places, strict=True)
            ]
            free_us = max(issued) + float(pair[0].duration_us[places[0]])
        end_us = max(end_us, free_us)
    return end_us


def _issued_us(one: Replica, place: int, free_us: float, num_actions_ahead: int | None) -> float:
    """The start of the first action of its rank that is issued behind a reduction."""
    rank = one.lists.rank[place]
    computing = np.flatnonzero((one.lists.rank == rank) & (one.lists.type < _SEND_F))
    starts_us, end_us = one.times.starts_us[computing], float(one.times.ends_us[computing].max())
    if num_actions_ahead is None:
        return max(end_us, free_us)
    ready = int(np.searchsorted(computing, place))
    free = int(np.searchsorted(starts_us, free_us)) + num_actions_ahead
    number = max(ready, free)
    return float(starts_us[number]) if number < len(computing) else max(end_us, free_us)


def reduction_table(paths: Sequence[Path], num_microbatches: int, evaluations: int) -> Table:
    """Per model two replicas, with the first two batches; times over that of many queues."""
    by_model: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_model[model_of(path.stem)].append(path)
    printed = Table(
        "model", "in the list", "held back", "2 actions late", "8 actions late", "at the end"
    )
    for model, own in by_model.items():
        pair = [replica_of(case_of(path, num_microbatches, None), evaluations) for path in own[:2]]
        base_us = together(pair, one_queue=False)
        found = [
            together(pair, one_queue=True),
            *(held_back(pair, ahead) for ahead in (0, 2, 8, None)),
        ]
        cells = ["hangs" if math.isinf(us) else f"{us / base_us:.4f}" for us in found]
        printed.add_row(model, *cells)
    return printed


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with *-test-*.json problems")
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--ranks", type=int, help="instead of those of the problems")
    parser.add_argument("--evaluations", type=int, default=64, help="of the search for each plan")
    parser.add_argument("--reductions", action="store_true", help="two replicas instead of one")
    arguments = parser.parse_args()
    paths = sorted(arguments.folder.glob("*-test-*.json"))
    if not paths:
        parser.error(f"{arguments.folder} holds no *-test-*.json problems")
    if arguments.reductions:
        table = reduction_table(paths, arguments.microbatches, arguments.evaluations)
    else:
        table = cost_table(paths, arguments.microbatches, arguments.ranks, arguments.evaluations)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
