"""The page of ``five_models.py``: tables of what it has measured, a section per kind of batches."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["DIP", "DIP_SPLIT", "DIP_UNLIMITED", "section", "write"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "five_models.md"
DIP, DIP_UNLIMITED = "DIP", "DIP, no memory limit"
DIP_SPLIT = "DIP, split backward"
ONE_F_ONE_B = ("1f1b", "1f1b-stock")
INTERLEAVED = ("interleaved", "interleaved-stock")
HEADINGS = {"dip": "## The published models and batches", "mixed": "## A harder mixture"}

Model = Mapping[str, Any]
"""What was measured of one model, as ``Found.record`` has it."""


def mean(model: Model, technique: str, value: str) -> float:
    """Of one figure of a technique's plans over the test problems."""
    return statistics.mean(made[value] for made in model["plans"][technique])


def gain(model: Model, names: Sequence[str], technique: str = DIP) -> float | None:
    """Mean throughput over the best of ``names``: the one that is best on average."""
    num_tests = len(model["plans"][technique])
    known = [name for name in names if len(model["baselines"].get(name, ())) == num_tests]
    if not known:
        return None
    best = max(known, key=lambda name: statistics.mean(model["baselines"][name]))
    ratios = zip(model["plans"][technique], model["baselines"][best], strict=True)
    return statistics.mean(made["utilisation"] / other for made, other in ratios)


def shown(ratio: float | None) -> str:
    """A gain; nothing where a batch cannot be run."""
    return "-" if ratio is None else f"{ratio:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline(found: Mapping[str, Model]) -> str:
    """What is asked of a schedule first."""

    def runnable(model: Model) -> list[str]:
        peaks = model["peaks"].items()
        return [n for n, peak in peaks if peak <= model["limit_bytes"] and "without" not in n]

    def row(title: str, value: Callable[[Model], str]) -> list[str]:
        return [title, *(value(model) for model in found.values())]

    def means(title: str, technique: str, value: str) -> list[str]:
        return row(title, lambda model: f"{mean(model, technique, value):.3f}")

    def peak(model: Model) -> str:
        return f"{max(made['peak_bytes'] for made in model['plans'][DIP]) / 1e9:.0f}"

    return markdown(
        ["", *(model.upper() for model in found)],
        [
            means("utilisation", DIP, "utilisation"),
            means("ratio to the lower bound", DIP, "of_bound"),
            means("the same without memory limit", DIP_UNLIMITED, "of_bound"),
            means("ratio to the plain bound", DIP, "of_plain_bound"),
            means("utilisation at the lower bound", DIP, "bound_utilisation"),
            means("utilisation, split backward", DIP_SPLIT, "utilisation"),
            means("its ratio to the lower bound", DIP_SPLIT, "of_bound"),
            row("throughput over 1F1B, best cut", lambda m: shown(gain(m, ONE_F_ONE_B))),
            row("over interleaved, best cut", lambda m: shown(gain(m, INTERLEAVED))),
            row("over the paper's Megatron, 4 chunks", lambda m: shown(gain(m, ["megatron-4"]))),
            row("the same, best number of chunks", lambda m: shown(gain(m, ["megatron"]))),
            row("the same under the limit", lambda m: shown(gain(m, ["megatron-recompute"]))),
            row("over the paper's nnScaler", lambda m: shown(gain(m, ["nnscaler"]))),
            row("over the paper's Optimus", lambda m: shown(gain(m, ["optimus-coarse"]))),
            row("over the best baseline in 80 GB", lambda m: shown(gain(m, runnable(m)))),
            row("peak memory, GB", peak),
            row("planning, s of one core", lambda m: f"{mean(m, DIP, 'seconds'):.2f}"),
        ],
    )


def over_baselines(found: Mapping[str, Model]) -> str:
    """Throughput of plans over every baseline, and what each holds."""
    names = next(iter(found.values()))["baselines"]

    def cell(model: Model, name: str) -> str:
        peak = model["peaks"].get(name, 0)
        over = f" ({peak / 1e9:.0f} GB)" if peak > model["limit_bytes"] else ""
        return shown(gain(model, [name])) + over

    rows = [[f"`{name}`", *(cell(m, name) for m in found.values())] for name in names]
    return markdown(["plans are faster by", *(model.upper() for model in found)], rows)


def with_and_without(found: Mapping[str, Model]) -> str:
    """Utilisation with and without every technique."""
    names = next(iter(found.values()))["plans"]

    def cell(model: Model, name: str) -> str:
        return f"{mean(model, name, 'utilisation'):.3f}" if model["plans"][name] else "-"

    rows = [[name, *(cell(model, name) for model in found.values())] for name in names]
    return markdown(["utilisation", *(model.upper() for model in found)], rows)


PUBLISHED = """
What the paper reports, measured on GPUs against its own baselines: VLMs are 1.16 to 1.76 times as
fast as with Megatron, nnScaler and Optimus, text to video 1.37 to 1.97 times as with the first two.
VLM-S is 1.63 times as fast as Megatron in its ablation (26.13 s to 16.05 s). The baselines that it
means are `megatron`, `nnscaler` and `optimus-coarse`; the best cuts are stricter. How many chunks
its Megatron has is not published: with 4 per rank VLM-S comes nearest. Of VLMs, `optimus-coarse`
and `encoder-in-bubbles` here hold the towers' activations of the whole batch, many times the limit;
in that memory the order hardly matters: plans lose next to nothing by keeping the limit.
"""

ABOUT = {
    "dip": """
Models, images, packing, clips, 64 microbatches and parallel sizes are as published, drawn from
`dip-vlm` and `dip-t2v` ([workloads.md](workloads.md)); costs are those of
`configs/clusters/h100_*_half_peak.yaml`, partitions those of `configs/partitions`. Cuts are chosen
on 2 fit batches and judged on {num_tests} test batches, {limit:.0f} GB per rank, {budget:.0f} ms of
search per plan on one core, in processor time ({date}). Made by `python benchmarks/five_models.py`.
""",
    "mixed": """
The sample batches of [`benchmarks/problems`](../benchmarks/problems/README.md), a mixture of ours
with 16 to 24 microbatches and stand-ins for the models; partitions are those of
`benchmarks/problems/partitions`. Cuts are chosen on 4 fit batches and judged on {num_tests} test
batches, {limit:.0f} GB per rank, {budget:.0f} ms of search per plan on one core, in processor time
({date}). Made by `python benchmarks/five_models.py --batches mixed`.
""",
}


def section(batches: str, found: Mapping[str, Model]) -> str:
    """The tables of one kind of batches."""
    first = next(iter(found.values()))
    about = (
        ABOUT[batches]
        .strip()
        .format(
            num_tests=len(first["plans"][DIP]),
            limit=first["limit_bytes"] / 1e9,
            budget=first["budget_ms"],
            date=first["date"],
        )
    )
    parts = [HEADINGS[batches], about, headline(found)]
    if batches == "dip":
        parts.append(PUBLISHED.strip())
    parts += [
        "Against every baseline; in brackets what it holds where that is over the limit:",
        over_baselines(found),
        "With and without each technique:",
        with_and_without(found),
    ]
    return "\n\n".join(parts) + "\n"


def write(batches: str, found: Mapping[str, Model]) -> None:
    """Put the section into the page, in the place of the one that is there."""
    page = DOCUMENT.read_text(encoding="utf-8")
    start = page.index(HEADINGS[batches])
    end = page.find("\n## ", start + 1)
    rest = "" if end < 0 else page[end:]
    DOCUMENT.write_text(page[:start] + section(batches, found) + rest, encoding="utf-8")
