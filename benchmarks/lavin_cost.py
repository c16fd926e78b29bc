"""What tuning adapters costs: measured on CPU against full tuning, and simulated for LaVIN on A100.

    .venv/bin/python benchmarks/lavin_cost.py [--pairs 3] [--iterations 8]

Measured: a small pair of towers with the proportions of CLIP ViT-L and LLaMA-7B (widths 1 to 4,
layers 3 to 4, 257 rows of an image), tuned through adapters and as a whole, under plans on two
pipeline ranks; runs alternate.  Beside the time that passes, processor time is taken, as the
difference between a long and a short run: other programs on the machine change it less.

Simulated: 20 epochs of ScienceQA on 8 A100, through the cost model and the planner, beside the
published hours (Luo et al., arXiv 2305.15023).  Assumptions are printed with the results.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table

from megatron_dip.costs import ClusterConfig, ItemSize, ItemSizes, cluster_builder, load_model
from megatron_dip.partition import Partition, cut_evenly, partition_from_layers
from megatron_dip.planner import make_plan
from megatron_dip.report import run_local_training

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "lavin_tiny.yaml"
NUM_RANKS = 2
WARM_UP_ITERATIONS = 3
TIMEOUT_SECONDS = 400.0

NUM_SAMPLES, NUM_EPOCHS, GLOBAL_BATCH, SAMPLES_PER_MICROBATCH = 12726, 20, 32, 4
IMAGE_SHARE = 6218 / 12726
SEQ_LENGTH, IMAGE_ROWS = 512, 257
PUBLISHED = {"lavin_7b": (1.4, 33.9), "lavin_13b": (2.0, 55.9)}
# Words of ScienceQA on average (arXiv 2209.09513, table 1) with the share of problems that have
# them: question, choices, context, lecture, explanation; the rest is the prompt's own words.
MEAN_WORDS = 12.1 + 2.8 * 4.4 + 0.48 * 41.3 + 0.84 * 125.1 + 0.91 * 47.7 + 18
TOKENS_PER_WORD, LENGTH_SPREAD = 1.35, 0.5
ASSUMPTIONS = (
    "A100 80 GB: 312 TFLOPS bf16 of which the largest kernels reach 80 %, 2039 GB/s, NVLink",
    f"global batch {GLOBAL_BATCH}, {NUM_SAMPLES} samples, {NUM_EPOCHS} epochs; "
    f"{100 * IMAGE_SHARE:.0f} % of the samples have an image",
    f"lengths without padding: log-normal, mean {MEAN_WORDS * TOKENS_PER_WORD:.0f} rows "
    f"({MEAN_WORDS:.0f} words on average, {TOKENS_PER_WORD} tokens a word), spread "
    f"{LENGTH_SPREAD}, cut at {SEQ_LENGTH}",
    "no data loading, evaluation, checkpoints or start-up; gradients of 15 to 22 MB are reduced "
    "for nothing",
    "padded+blank: every sample has 512 rows and an image, as in the released code; padded: text "
    "skips the encoder; packed: sequences of 512 rows hold whole samples",
)

console = Console()


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One model under one layout with one kind of batch."""

    model: str
    pipeline_ranks: int
    data: str
    hours: float
    peak_gb: float
    """Of the fullest rank; weights, adapters' optimizer state and activations."""


def main(
    pairs: Annotated[int, typer.Option(min=0, help="Rounds of adapters, full.")] = 3,
    iterations: Annotated[int, typer.Option(min=5, help="Iterations per run.")] = 8,
    output: Annotated[Path, typer.Option(help="Where logs and results go.")] = (
        ROOT / "runs" / "lavin_cost"
    ),
) -> None:
    """Simulate, measure, and print both."""
    output.mkdir(parents=True, exist_ok=True)
    simulated = simulate_all()
    console.print(simulated_table(simulated))
    for line in ASSUMPTIONS:
        console.print(f"- {line}", highlight=False)
    results: dict[str, Any] = {"simulated": [asdict(one) for one in simulated]}
    if pairs:
        results["measured"] = measure(pairs, iterations, output)
        console.print(measured_line(results["measured"]))
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"results: {output / 'results.json'}")


def simulate_all() -> list[Simulated]:
    """All models, layouts and kinds of batch."""
    return [
        simulate(model, ranks, data)
        for model in PUBLISHED
        for ranks in (1, 2, 4)
        for data in ("padded+blank", "padded", "packed")
    ]


def simulate(model: str, ranks: int, data: str, num_batches: int = 4) -> Simulated:
    """Hours of the whole training from the mean of some batches.

    Replicas have different batches, and the slowest of them is waited for.
    """
    shape = load_model(ROOT / "configs" / "models" / f"{model}.yaml")
    cluster = ClusterConfig(
        name=f"8 A100, {ranks} pipeline ranks",
        gpu="A100",
        num_gpus=8,
        pipeline_parallel=ranks,
        sequence_parallel=False,
        distributed_optimizer=False,
    )
    builder = cluster_builder(shape, cluster)
    partition = cut(model, ranks)
    random = np.random.default_rng(0)
    times_us, peaks = [], []
    for _ in range(num_batches):
        plans = [
            make_plan(
                builder.build(draw(random, data, GLOBAL_BATCH // cluster.data_parallel)),
                partition,
                evaluations=64 if ranks > 1 else None,
            )
            for _ in range(cluster.data_parallel)
        ]
        times_us.append(max(plan.estimate.makespan_us for plan in plans))
        peaks.append(max(max(plan.estimate.peak_bytes) for plan in plans))
    iterations = NUM_EPOCHS * (NUM_SAMPLES // GLOBAL_BATCH)
    return Simulated(
        model=model,
        pipeline_ranks=ranks,
        data=data,
        hours=fmean(times_us) * iterations / 3.6e9,
        peak_gb=max(peaks) / 1e9,
    )


def cut(model: str, ranks: int) -> Partition:
    """Even layers in one segment; the encoder, worth less than a layer or two, on the first rank,
    from which as many language layers are taken."""
    num_layers = {"lavin_7b": 32, "lavin_13b": 40}[model]
    vision = ((24,) + (0,) * (ranks - 1),)
    language = cut_evenly(num_layers, 1, ranks)[0]
    if ranks > 1:
        language = (language[0] - 1, *language[1:-1], language[-1] + 1)
    return partition_from_layers({"vision": vision, "language": (language,)}, ranks)


def draw(random: np.random.Generator, data: str, num_samples: int) -> list[ItemSizes]:
    """Microbatches of one replica's share of a batch."""
    mean = MEAN_WORDS * TOKENS_PER_WORD
    centre = np.log(mean) - LENGTH_SPREAD**2 / 2
    lengths = np.exp(random.normal(centre, LENGTH_SPREAD, num_samples))
    rows = [int(row) for row in np.clip(lengths, 40, SEQ_LENGTH)]
    has_image = [bool(share) for share in random.random(num_samples) < IMAGE_SHARE]
    if data == "packed":
        return [_microbatch(group) for group in _pack(rows, has_image)]
    step = min(SAMPLES_PER_MICROBATCH, num_samples)
    is_blank = data == "padded+blank"
    samples = [([SEQ_LENGTH], int(is_blank or image)) for image in has_image]
    return [_microbatch(samples[start : start + step]) for start in range(0, num_samples, step)]


def _pack(rows: list[int], has_image: list[bool]) -> list[list[tuple[list[int], int]]]:
    """First fit; as many sequences in a microbatch as rows fill the published one."""
    sequences: list[tuple[list[int], int]] = []
    for length, image in sorted(zip(rows, has_image, strict=True), reverse=True):
        for place, (spans, count) in enumerate(sequences):
            if sum(spans) + length <= SEQ_LENGTH:
                sequences[place] = ([*spans, length], count + image)
                break
        else:
            sequences.append(([length], int(image)))
    return [
        sequences[start : start + SAMPLES_PER_MICROBATCH]
        for start in range(0, len(sequences), SAMPLES_PER_MICROBATCH)
    ]


def _microbatch(sequences: list[tuple[list[int], int]]) -> ItemSizes:
    items, first = [], 0
    for spans, images in sequences:
        needs = {"vision": tuple(range(first, first + images))}
        items.append(ItemSize(tokens=sum(spans), spans=tuple(spans), needs=needs))
        first += images
    image = ItemSize(tokens=IMAGE_ROWS, spans=(IMAGE_ROWS,))
    return {"vision": [image] * first, "language": items}


def measure(pairs: int, iterations: int, output: Path) -> dict[str, Any]:
    """Seconds per step of both ways of tuning, and bytes of what each has to keep."""
    data = ROOT / "runs" / "scienceqa"
    if not (data / "problems.json").exists():
        script = ROOT / "scripts" / "make_scienceqa_data.py"
        subprocess.run([sys.executable, str(script), str(data)], check=True)
    seconds: dict[str, list[float]] = {"adapters": [], "full": []}
    processor: dict[str, list[float]] = {"adapters": [], "full": []}
    for pair in range(pairs):
        for tuning, found in seconds.items():
            elapsed_ms, long = run_once(output, tuning, pair, iterations)
            _, short = run_once(output, tuning, pair, WARM_UP_ITERATIONS)
            found.append(median(elapsed_ms[WARM_UP_ITERATIONS:]) / 1000)
            processor[tuning].append((long - short) / (iterations - WARM_UP_ITERATIONS))
    whole = load_shape(write_config(output / "full.yaml", "full"))
    return {
        "seconds_per_step": seconds,
        "processor_seconds_per_step": processor,
        "ratio": median(a / b for a, b in zip(seconds["adapters"], seconds["full"], strict=True)),
        "adapter_bytes": (output / "adapters.pt").stat().st_size,
        "model_bytes": 4 * whole,
    }


def run_once(
    output: Path, tuning: str, pair: int, iterations: int
) -> tuple[Sequence[float], float]:
    """Milliseconds of every iteration, and processor seconds of all ranks together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_local_training(
        ROOT / "examples" / "finetune_lavin.py",
        arguments(write_config(output / f"{tuning}.yaml", tuning), iterations, output),
        num_ranks=NUM_RANKS,
        log=output / f"{tuning}-{pair}-{iterations}" / "training.log",
        timeout_seconds=TIMEOUT_SECONDS,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return run.elapsed_ms, used


def write_config(path: Path, tuning: str) -> Path:
    """The tiny model in the proportions of the published one."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"]["vision"] |= {
        "num_layers": 6,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "image_size": 224,
    }
    config["model"]["language"] |= {
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_attention_heads": 8,
        "num_query_groups": 8,
    }
    config["model"]["adapter"]["tuning"] = tuning
    data = CONFIG.parent
    for name in ("path", "image_folder", "tokenizer"):
        config["data"][name] = str((data / config["data"][name]).resolve())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def load_shape(config: Path) -> int:
    """Parameters of the model."""
    from megatron_dip.families.configs import load_config

    return load_config(config).model_shape().num_parameters()


def arguments(config: Path, iterations: int, output: Path) -> list[str]:
    return [
        *("--pipeline-model-parallel-size", str(NUM_RANKS), "--dip-config", str(config)),
        *("--micro-batch-size", "4", "--global-batch-size", "16", "--dip-schedule"),
        *("--train-iters", str(iterations), "--eval-iters", "0", "--eval-interval", "1000"),
        *("--lr", "1e-3", "--min-lr", "1e-4", "--save-adapters", str(output / "adapters.pt")),
    ]


def simulated_table(results: list[Simulated]) -> Table:
    """Hours and memory beside the published ones."""
    table = Table(title="LaVIN on 8 A100, 20 epochs of ScienceQA (simulated)")
    for name in ("model", "pipeline ranks", "data", "hours", "GB", "published hours, GB"):
        table.add_column(name)
    for one in results:
        hours, gigabytes = PUBLISHED[one.model]
        table.add_row(
            one.model,
            str(one.pipeline_ranks),
            one.data,
            f"{one.hours:.2f}",
            f"{one.peak_gb:.1f}",
            f"{hours}, {gigabytes}",
        )
    return table


def measured_line(measured: dict[str, Any]) -> str:
    """One sentence."""
    seconds, processor = (
        {name: median(found) for name, found in measured[key].items()}
        for key in ("seconds_per_step", "processor_seconds_per_step")
    )
    return (
        f"measured on CPU, per step: {seconds['adapters']:.2f} s tuning adapters, "
        f"{seconds['full']:.2f} s tuning all (ratio {measured['ratio']:.2f}); processor time "
        f"{processor['adapters']:.2f} s and {processor['full']:.2f} s (ratio "
        f"{processor['adapters'] / processor['full']:.2f}); adapters take "
        f"{measured['adapter_bytes'] / 1e6:.2f} MB, all weights "
        f"{measured['model_bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    typer.run(main)
