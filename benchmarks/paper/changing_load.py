"""VLM-S over 40 iterations whose share of images rises and falls.

Images of a microbatch are drawn between two bounds; both rise from 0 in iterations 1 to 5, to 16
and to 32, and fall back to 0 by iteration 20, twice.  The static systems keep the cut that suits
batches of the published mixture; plans are made anew.  Published: at iteration 6 Megatron takes
52.9% longer, nnScaler and Optimus 10.4%; in iterations 15 to 20, when images are gone, nnScaler
50.5%.
"""

import statistics
from collections.abc import Sequence
from random import Random
from typing import Any

from megatron_dip.costs.mixtures import joined_sequences
from megatron_dip.costs.published_mixtures import dip_vlm
from megatron_dip.costs.sizes import ItemSize, ItemSizes
from megatron_dip.planner import make_plan

from .chart import Axis, Series, draw_lines
from .results import Result, markdown, tracked
from .setting import NUM_MICROBATCHES, builder_of, partition_of, sample_batches
from .systems import MEGATRON, NNSCALER, OPTIMUS, Systems

__all__ = ["run"]

_MODEL = "vlm_s"
_PERIOD, _PEAK = 20, 5
_MOST_IMAGES = (16, 32)
_SYSTEMS = (MEGATRON, NNSCALER, OPTIMUS)
_OURS = "ours"
_PUBLISHED = {
    MEGATRON: [(6.5, 1.529)],
    NNSCALER: [(18.0, 1.505)],
    f"{OPTIMUS} and {NNSCALER}": [(6.5, 1.104)],
}
"""At the middle of their iterations."""


def run(quick: bool) -> Result:
    """All systems on every iteration."""
    iterations = [1, 5] if quick else list(range(1, 41))
    size, evaluations = (4, 8) if quick else (NUM_MICROBATCHES, 150)
    partition = partition_of(_MODEL)
    systems = Systems(sample_batches(_MODEL, size), partition)
    seconds: dict[str, list[float]] = {name: [] for name in (*_SYSTEMS, _OURS)}
    for iteration in tracked(iterations, "changing load"):
        random = Random(iteration)
        bounds = image_bounds(iteration)
        drawn = [_microbatch(random, bounds) for _ in range(size)]
        problem = builder_of(_MODEL).build(drawn)
        plan = make_plan(problem, partition, evaluations=evaluations)
        assert plan.estimate is not None
        seconds[_OURS].append(plan.estimate.makespan_us / 1e6)
        for name in _SYSTEMS:
            seconds[name].append(systems.run(name, problem).makespan_us / 1e6)
    data: dict[str, Any] = {
        "model": _MODEL,
        "iterations": iterations,
        "bounds": [image_bounds(iteration) for iteration in iterations],
        "seconds": seconds,
        "published_over_ours": _PUBLISHED,
    }
    return Result(data=data, table=_table(iterations, seconds), picture=_picture(data))


def image_bounds(iteration: int) -> tuple[int, int]:
    """Fewest and most images of a microbatch, in iterations from 1."""
    place = (iteration - 1) % _PERIOD + 1
    if place <= _PEAK:
        share = (place - 1) / (_PEAK - 1)
    else:
        share = (_PERIOD - place) / (_PERIOD - _PEAK)
    low, high = (round(share * most) for most in _MOST_IMAGES)
    return low, high


def _microbatch(random: Random, bounds: tuple[int, int]) -> ItemSizes:
    """A sequence with so many images, each with a caption, filled up with documents."""
    mixture = dip_vlm()
    pairs, documents, _ = mixture.sources
    num_images = random.randint(*bounds)
    samples: list[ItemSize] = []
    room = mixture.sequence_tokens
    while room > 0:
        number = len(samples)
        has_image = number < num_images
        source = pairs if has_image else documents
        wanted = max(1, round(source.text_tokens.draw(random))) + has_image * mixture.image_tokens
        tokens = min(room, wanted)
        needed = (number,) if has_image else ()
        samples.append(ItemSize(tokens=tokens, spans=(tokens,), needs={"vision": needed}))
        room -= tokens
    image = ItemSize(
        tokens=mixture.image_patches,
        spans=(mixture.image_patches,),
        output_tokens=mixture.image_tokens,
    )
    return joined_sequences({"vision": [image] * num_images, "language": samples})


def _table(iterations: Sequence[int], seconds: dict[str, list[float]]) -> str:
    def over_ours(name: str, wanted: Sequence[int]) -> str:
        ratios = [
            seconds[name][place] / seconds[_OURS][place]
            for place, iteration in enumerate(iterations)
            if iteration in wanted
        ]
        return f"{statistics.mean(ratios) - 1:+.1%}" if ratios else "-"

    both = (5, 6, 25, 26)
    none = (*range(15, 21), *range(35, 41))
    rows = [
        [
            name,
            f"{sum(seconds[name]):.0f}",
            over_ours(name, both),
            over_ours(name, none),
            over_ours(name, iterations),
        ]
        for name in seconds
    ]
    return markdown(
        [
            "",
            "all iterations, s",
            "over ours, most images (5, 6, 25, 26)",
            "over ours, few images (15 to 20, 35 to 40)",
            "over ours, mean",
        ],
        rows,
    )


def _picture(data: dict[str, Any]) -> str:
    iterations, seconds = data["iterations"], data["seconds"]
    series = []
    for name in _SYSTEMS:
        ratios = [a / b for a, b in zip(seconds[name], seconds[_OURS], strict=True)]
        points = [*zip(iterations, ratios, strict=True), (iterations[-1] + 1, ratios[-1])]
        series.append(Series(name, points, "steps"))
    series += [
        Series(f"{name}, published", points, "marks", number)
        for number, (name, points) in enumerate(_PUBLISHED.items())
    ]
    highest = max(y for one in series for _, y in one.points)
    return draw_lines(
        "VLM-S: iteration time over ours while images come and go",
        Axis("iteration", 1, max(iterations) + 1, ticks=[1, 5, 10, 15, 20, 25, 30, 35, 40]),
        Axis("iteration time / ours", 1.0, highest + 0.1),
        series,
    )
