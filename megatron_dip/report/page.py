"""The page about a run: records of all steps as curves, and timelines of those that have one."""

import html
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from megatron_dip.errors import DataError
from megatron_dip.report.lines import say_left_out
from megatron_dip.report.panels import measured_panel
from megatron_dip.report.steps import StepRecord, read_records
from megatron_dip.report.traces import plan_of_trace, read_traces
from megatron_dip.simulator.timeline import (
    COLOURS,
    plan_panel,
    timeline_data,
    timeline_template,
)

__all__ = ["write_report"]

_GB = 1e9
_MOST_MS = 1e12
_NO_TIMELINES = "No iteration of this run has both a measured timeline and its plan."


def write_report(folder: str | Path, output: str | Path, replica: int = 0) -> int:
    """Write the page about the run whose records lie in ``folder``, or in its folder ``trace``.

    What is left out, because it is damaged or belongs to an earlier run, is said there and logged.

    Returns:
        Number of iterations that it shows.

    Raises:
        DataError: There are no records, or they cannot be read.
    """
    folder = Path(folder)
    if (folder / "trace").is_dir():
        folder = folder / "trace"
    left_out: list[str] = []
    records = read_records(folder, replica, left_out.append)
    timelines = _timelines(folder, records, replica, left_out)
    for line in left_out:
        say_left_out(line)
    data = {
        "iterations": [record.iteration for record in records],
        "tiles": _tiles(records),
        "charts": _charts(records),
        "timeline_page": timeline_template(),
        "timelines": timelines,
        "left_out": left_out,
        "no_timelines": _NO_TIMELINES,
    }
    template = resources.files("megatron_dip.report").joinpath("page.html")
    # In JSON "<" only occurs inside strings; escaped, no string can end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(f"{folder.resolve()}, replica {replica}")
    page = template.read_text(encoding="utf-8").replace("__TITLE__", title, 2)
    Path(output).write_text(page.replace("__DATA__", text, 1), encoding="utf-8")
    return len(records)


def _throughput(record: StepRecord) -> float:
    """Tokens of the module with the loss, which is the last, per second."""
    return list(record.tokens.values())[-1] / record.step_us * 1e6


def _waited_ms(record: StepRecord) -> float:
    """For the plan alone where that is known; with the agreement of the ranks otherwise."""
    found = _milliseconds(record, "waited_ms")
    if found is not None:
        return found
    return max(rank.plan_us for rank in record.ranks) / 1000


def _planning_ms(record: StepRecord) -> float | None:
    return _milliseconds(record, "planning_ms")


def _milliseconds(record: StepRecord, name: str) -> float | None:
    """What the planner said; None where it said nothing that can be drawn."""
    found = record.planning.get(name)
    if isinstance(found, int | float) and abs(found) < _MOST_MS:
        return float(found)
    return None


def _tiles(records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    """Value and meaning."""
    settled = records[len(records) // 4 :]
    idle = median(max(record.idle_fractions) for record in settled)
    peak = max(rank.stored_bytes for record in records for rank in record.ranks)
    waited = sum(_waited_ms(record) for record in settled)
    total = sum(record.step_us for record in settled) / 1000
    return [
        (f"{median(map(_throughput, settled)):,.0f}", "tokens per second, median"),
        (f"{median(record.step_us for record in settled) / 1000:,.0f} ms", "per step, median"),
        (f"{idle:.1%}", "idle on the most idle rank, median"),
        (f"{waited / total:.1%}", "share of time waiting for plans"),
        (f"{median(abs(record.error) for record in settled):.1%}", "error of the makespan, median"),
        (f"{median(r.action_error for r in settled):.1%}", "error of single actions, median"),
        (f"{peak / _GB:.2f} GB" if peak else "-", "activations held, largest peak measured"),
        *_assignment_tiles(settled),
    ]


def _assignment_tiles(records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    """What the assignment of samples did, where there was one."""
    found = [record.assignment for record in records if record.assignment is not None]
    if not found:
        return []
    before, after = (median(one.replicas[place] for one in found) for place in (0, 1))
    return [
        (f"{before:.2f} → {after:.2f}", "most work of a replica over the mean, assigned; median"),
        (f"{median(one.num_moved for one in found):,.0f}", "moved in a batch, median"),
    ]


def _charts(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    ranks = range(max(len(record.ranks) for record in records))

    def series(
        name: str, colour: int, value: Callable[[StepRecord], float | None], dashed: bool = False
    ) -> dict[str, Any]:
        values = [value(record) for record in records]
        return {
            "name": name,
            "colour": COLOURS[colour % len(COLOURS)],
            "dashed": dashed,
            "values": [None if one is None else round(one, 4) for one in values],
        }

    def memory(rank: int, measured: bool) -> dict[str, Any]:
        def value(record: StepRecord) -> float | None:
            if rank >= len(record.ranks):
                return None
            one = record.ranks[rank]
            held = one.stored_bytes if measured else one.predicted_bytes
            return held / _GB if held else None

        name = f"rank {rank} {'measured' if measured else 'predicted'}"
        return series(name, rank, value, dashed=not measured)

    def idle_on(rank: int) -> Callable[[StepRecord], float | None]:
        return lambda r: 100 * r.idle_fractions[rank] if rank < len(r.ranks) else None

    idle = [series(f"rank {rank}", rank, idle_on(rank)) for rank in ranks]
    charts: list[dict[str, Any]] = [
        {
            "title": "Throughput, tokens per second",
            "unit": "",
            "series": [series("tokens/s", 0, _throughput)],
        },
        {
            "title": "Makespan and step",
            "unit": " ms",
            "series": [
                series("measured", 0, lambda r: r.measured_us / 1000),
                series("predicted", 1, lambda r: r.predicted_us / 1000, True),
                series("whole step", 2, lambda r: r.step_us / 1000),
            ],
        },
        {
            "title": "Error of prediction",
            "unit": " %",
            "series": [
                series("makespan", 0, lambda r: 100 * r.error),
                series("single actions, median", 1, lambda r: 100 * r.action_error),
            ],
        },
        {"title": "Idle", "unit": " %", "series": idle},
        {
            "title": "Plan: time to make it, time waited for it",
            "unit": " ms",
            "series": [
                series("waited", 1, _waited_ms),
                series("planning", 0, _planning_ms, True),
            ],
        },
        {
            "title": "Activations held, peak of each step",
            "unit": " GB",
            "series": [memory(rank, measured) for rank in ranks for measured in (True, False)],
        },
    ]
    for chart in charts:
        shown = [one for one in chart["series"] if any(v is not None for v in one["values"])]
        chart["series"] = shown
    return charts


def _timelines(
    folder: Path, records: Sequence[StepRecord], replica: int, left_out: list[str]
) -> list[dict[str, Any]]:
    """Measured above predicted, where both were written by the run that wrote the record."""
    runs = {record.iteration: record.run for record in records}
    try:
        traces = read_traces(folder, replica, left_out.append)
    except DataError:
        # Records alone are a report as well.
        return []
    timelines = []
    for trace in traces:
        if runs.get(trace.iteration) != trace.run:
            continue
        try:
            plan = plan_of_trace(folder, trace)
        except DataError as error:
            left_out.append(f"{error}: its timeline is left out")
            continue
        panels = [
            measured_panel(trace, "measured", plan.partition),
            plan_panel(plan, "predicted"),
        ]
        timelines.append({"iteration": trace.iteration, "data": timeline_data(panels)})
    return timelines
