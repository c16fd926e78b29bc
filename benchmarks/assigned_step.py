"""Steps of training with and without the assignment of samples: rehearsed, in pairs.

Draws global batches of the mixture ``dip-vlm`` for VLM-S (``configs/vlm_s.yaml``, four pipeline
ranks), assigns their samples by what training assigns them with, for every way of
``schedule.assignment`` the same batches, plans the share of every replica, and rehearses the plans:
the real executor and transfers, computing replaced by sleeping for the stated times.  The step of a
batch takes as long as its slowest replica.  Replicas are rehearsed one after another, so that two
cores are enough for four pipeline ranks; reductions between replicas are left out.

    python benchmarks/assigned_step.py [--batches 5] [--replicas 2] [--microbatches 8]
        [--repetitions 1] [-o R.json]

A microbatch is one packed sequence, of which the samples move.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_dip.costs import ItemSize, ItemSizes, Kernels, ProblemBuilder, config_builder
from megatron_dip.costs.mixtures import draw_microbatches
from megatron_dip.costs.published_mixtures import dip_vlm
from megatron_dip.families.configs import load_config
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.planner import make_plan
from megatron_dip.rehearsal import rehearse
from megatron_dip.simulator import simulate

# Processes of a rehearsal import this file: Megatron is loaded where batches are made.
if TYPE_CHECKING:
    from megatron_dip.families.base import SampleSet

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "vlm_s.yaml"
MOVES = ("none", "microbatches", "samples")
NUM_RANKS, NUM_TENSOR_RANKS = 4, 4
TRANSFER_SCALE = 0.01

Member = tuple[int, int]
"""A sample: the number of the sequence it was drawn in, and its place there."""
Batch = list[list[ItemSizes]]
"""Per replica the items of its microbatches."""


class DrawnSequences:
    """What the assigner asks of a data set, for sequences of a mixture."""

    def __init__(self, num_sequences: int) -> None:
        workload = dip_vlm()
        self.room = workload.sequence_tokens
        self._sequences = [
            _samples(drawn) for drawn in draw_microbatches(workload, num_sequences, 0, "samples")
        ]

    def __len__(self) -> int:
        return len(self._sequences)

    def members(self, i: int) -> tuple[Member, ...]:
        """Its samples."""
        return tuple((i, place) for place in range(len(self._sequences[i])))

    def member_sizes(self, member: Member) -> ItemSizes:
        """The images of a sample, and its tokens."""
        sequence, place = member
        return self._sequences[sequence][place]

    def sizes(self, entry: int | tuple[Member, ...]) -> ItemSizes:
        """Of a sequence as training packs it: its samples are spans of one item."""
        members = self.members(entry) if isinstance(entry, int) else entry
        parts = [self.member_sizes(member) for member in members]
        spans = tuple(part["language"][0].tokens for part in parts)
        return {
            "vision": list(chain.from_iterable(part["vision"] for part in parts)),
            "language": [ItemSize(tokens=sum(spans), spans=spans)],
        }


def _samples(drawn: ItemSizes) -> list[ItemSizes]:
    """Each with its images, from a drawn sequence."""
    return [
        {
            "vision": [drawn["vision"][image] for image in sample.needs["vision"]],
            "language": [replace(sample, needs={})],
        }
        for sample in drawn["language"]
    ]


def batches_of(
    dataset: DrawnSequences, builder: ProblemBuilder, num_replicas: int, count: int, moves: str
) -> list[Batch]:
    """All of the data set as the replicas read it, ``count`` microbatches at a time."""
    from megatron_dip.families.global_batches import BatchAssigner

    assigner = BatchAssigner(cast("SampleSet", dataset), builder, cast(Any, moves))
    size = num_replicas * count
    batches = []
    for first in range(0, len(dataset), size):
        # As Megatron deals sequences out: one to every replica in turn.
        given = [
            [[first + place * num_replicas + replica] for place in range(count)]
            for replica in range(num_replicas)
        ]
        shares: Sequence[Any] = given if moves == "none" else assigner.assign(given)[0]
        batches.append([[dataset.sizes(one) for (one,) in share] for share in shares])
    return batches


def step_ms(
    batch: Batch, config: FamilyConfig, builder: ProblemBuilder, repetitions: int
) -> dict[str, list[float]]:
    """Of every replica, predicted, and rehearsed where that is asked for."""
    partition = config.partition(NUM_RANKS)
    found: dict[str, list[float]] = {"predicted": [], "rehearsed": []}
    for replica in batch:
        plan = make_plan(
            builder.build(replica),
            partition,
            max_tokens=dict(partition.sub_microbatch_tokens),
            evaluations=64,
        )
        found["predicted"].append(simulate(plan).makespan_us / 1000)
        if repetitions:
            rehearsed = rehearse(plan, transfer_scale=TRANSFER_SCALE, repetitions=repetitions)
            found["rehearsed"].append(rehearsed.achieved_us / 1000)
    return {name: times for name, times in found.items() if times}


def measure(
    num_batches: int, num_replicas: int, num_microbatches: int, repetitions: int
) -> dict[str, list[Any]]:
    """Per way to move, its steps, in the order of the batches."""
    config = load_config(CONFIG)
    builder = config_builder(
        config.schedule,
        config.model_shape(),
        config.partition(NUM_RANKS),
        num_ranks=NUM_RANKS,
        num_tensor_ranks=NUM_TENSOR_RANKS,
        kernels=Kernels(),
    )
    dataset = DrawnSequences(num_batches * num_replicas * num_microbatches)
    ways = {
        moves: batches_of(dataset, builder, num_replicas, num_microbatches, moves)
        for moves in MOVES
    }
    steps: dict[str, list[Any]] = {moves: [] for moves in MOVES}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rehearsing", total=num_batches * len(MOVES))
        for number in range(num_batches):
            for moves in MOVES:
                steps[moves].append(step_ms(ways[moves][number], config, builder, repetitions))
                progress.advance(task)
    return steps


def table_of(steps: dict[str, list[Any]]) -> Table:
    """Medians of the slowest replica, and ratios batch by batch."""
    table = Table("assignment", "step", "median", "without it over it: median (all)")
    for way in steps["none"][0]:
        given = [max(step[way]) for step in steps["none"]]
        for moves, found in steps.items():
            slowest = [max(step[way]) for step in found]
            ratios = [first / own for first, own in zip(given, slowest, strict=True)]
            table.add_row(
                moves,
                way,
                f"{median(slowest):.0f} ms",
                f"{median(ratios):.3f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
            )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8, help="of a replica")
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of every rehearsal; 0: predicted alone"
    )
    parser.add_argument("-o", "--output", type=Path, help="where the numbers go (JSON)")
    given = parser.parse_args(arguments)
    steps = measure(given.batches, given.replicas, given.microbatches, given.repetitions)
    Console().print(table_of(steps))
    if given.output is not None:
        results = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "date": date.today().isoformat(),
            "replicas": given.replicas,
            "microbatches": given.microbatches,
            "steps": steps,
        }
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
