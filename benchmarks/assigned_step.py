"""Steps of training with and without the assignment of samples: rehearsed, in pairs.

Takes global batches of a data set as training reads them, for every way of ``schedule.assignment``
the same ones, plans the share of every replica, and rehearses the plans: the real executor and
transfers, computing replaced by sleeping for the stated times.  The step of a batch takes as long
as its slowest replica.  Replicas are rehearsed one after another, so that two cores are enough for
two pipeline ranks; reductions between replicas are left out.

    python benchmarks/assigned_step.py [--batches 6] [--replicas 2] [--repetitions 1] [-o R.json]

The batches are those of ``configs/vlm_tiny.yaml`` (data: ``scripts/make_sample_data.py
runs/sample``) with text and images apart, one sequence per microbatch.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_dip.costs import ItemSizes, Kernels, ProblemBuilder, config_builder
from megatron_dip.families.configs import load_config
from megatron_dip.families.forms import FamilyConfig
from megatron_dip.families.vlm.config import VlmConfig
from megatron_dip.planner import make_plan
from megatron_dip.rehearsal import rehearse
from megatron_dip.simulator import simulate

# Processes of a rehearsal import this file: Megatron is loaded where batches are made.
if TYPE_CHECKING:
    from megatron_dip.families.global_batches import BatchAssigner
    from megatron_dip.families.vlm.dataset import VlmDataset

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "vlm_tiny.yaml"
MOVES = ("none", "microbatches", "samples")
MICROBATCHES = 4
TRANSFER_SCALE = 0.01

Batch = list[tuple[ItemSizes, ...]]
"""Per replica the items of its microbatches."""


def data_set(config: VlmConfig, num_samples: int) -> "VlmDataset":
    """The sequences of ``config``, no image decoded."""
    from megatron_dip.families.data.index import build_index
    from megatron_dip.families.data.packing import PackingOptions
    from megatron_dip.families.data.sources import DataSettings
    from megatron_dip.families.vlm.dataset import VlmDataset

    data = config.data
    settings = DataSettings(
        format=data.format,
        samples=data.path,
        image_folder=data.image_folder,
        tokenizer=data.tokenizer,
        text_form=data.text_form(),
        seq_length=config.model.language.seq_length,
        patch_size=config.model.vision.patch_size,
        merge_size=config.model.vision.merge_size,
        min_image_tokens=data.min_image_tokens,
        max_image_tokens=data.max_image_tokens,
    )
    index, _ = build_index(settings, data.path.parent)
    return VlmDataset(
        settings,
        index,
        num_samples=num_samples,
        seed=1234,
        decode_images=False,
        packing=PackingOptions(separation=1.0),
    )


def batches_of(
    dataset: "VlmDataset", sampler: Any, num_replicas: int, assigner: "BatchAssigner | None"
) -> Iterator[Batch]:
    """Global batches as the replicas of a run read them."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator

    from megatron_dip.families.global_batches import AssignedSampler, GlobalBatchSizes

    sources = []
    for replica in range(num_replicas):
        own = sampler(replica)
        if assigner is not None:
            calculator = ConstantNumMicroBatchesCalculator(
                num_replicas * MICROBATCHES, 1, num_replicas, False, 0
            )
            own = AssignedSampler(
                own,
                assigner,
                GlobalBatchSizes(num_replicas=num_replicas, calculator=calculator),
                first_iteration=1,
                say=lambda _: None,
            )
        sources.append(iter(own))
    while True:
        share = [list(islice(source, MICROBATCHES)) for source in sources]
        if any(len(one) < MICROBATCHES for one in share):
            return
        yield [
            tuple(
                dataset.collate_fn([dataset[entry] for entry in one]).metadata() for one in replica
            )
            for replica in share
        ]


def step_ms(
    batch: Batch, config: FamilyConfig, builder: ProblemBuilder, repetitions: int
) -> dict[str, list[float]]:
    """Of every replica, predicted, and rehearsed where that is asked for."""
    partition = config.partition(2)
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


def measure(num_batches: int, num_replicas: int, repetitions: int) -> dict[str, list[Any]]:
    """Per way to move, its steps, in the order of the batches."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megatron_dip.families.global_batches import BatchAssigner

    config = load_config(CONFIG)
    assert isinstance(config, VlmConfig)
    num_samples = num_batches * num_replicas * MICROBATCHES
    dataset = data_set(config, num_samples)
    builder = config_builder(
        config.schedule,
        config.model_shape(),
        config.partition(2),
        num_ranks=2,
        kernels=Kernels(is_fp32=True),
    )

    def sampler(replica: int) -> MegatronPretrainingSampler:
        return MegatronPretrainingSampler(num_samples, 0, 1, replica, num_replicas)

    ways = {
        moves: list(
            batches_of(
                dataset,
                sampler,
                num_replicas,
                None if moves == "none" else BatchAssigner(dataset, builder, moves),  # type: ignore[arg-type]
            )
        )
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
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of every rehearsal; 0: predicted alone"
    )
    parser.add_argument("-o", "--output", type=Path, help="where the numbers go (JSON)")
    given = parser.parse_args(arguments)
    steps = measure(given.batches, given.replicas, given.repetitions)
    Console().print(table_of(steps))
    if given.output is not None:
        results = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "date": date.today().isoformat(),
            "replicas": given.replicas,
            "steps": steps,
        }
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
