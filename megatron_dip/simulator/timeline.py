"""Timelines: predicted and measured schedules as one HTML file that needs no network.

A *panel* is one schedule, a row per rank; panels stand under one another on a shared time axis, so
that a prediction can be compared with a measurement, or one schedule with another.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_dip.plan.actions import ActionType
from megatron_dip.plan.graph import Work
from megatron_dip.plan.plan import Plan
from megatron_dip.simulator.simulate import Simulation, simulate
from megatron_dip.simulator.tasks import build_task_table

__all__ = [
    "COLOURS",
    "Panel",
    "Span",
    "SpanKind",
    "idle_fractions",
    "module_colours",
    "plan_panel",
    "timeline_data",
    "timeline_template",
    "write_timeline",
]

SpanKind = Literal["F", "B", "I", "W", "other", "wait", "copy"]
"""A copy to or from the host goes on beside the rest of what its rank does."""

_KINDS: tuple[SpanKind, ...] = ("F", "B", "I", "W", "other", "wait")
# Told apart by people who do not see red or green, and readable under white text.
COLOURS = ("#2f7fc1", "#d9822b", "#2a9d7f", "#9b5fb5", "#c2506b", "#7d7a3a", "#4f5fa8", "#8a6a52")
_STAGE = re.compile(r"\d+")


class Span(NamedTuple):
    """Something that a rank did; times in microseconds from the start of the panel."""

    rank: int
    module: str
    action: str
    """Action text, e.g. ``3F12.1``."""
    start_us: float
    end_us: float
    kind: SpanKind


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One schedule."""

    title: str
    spans: Sequence[Span]
    num_ranks: int
    memory: Mapping[int, Sequence[tuple[float, int]]] | None = None
    """Per rank: (time in microseconds, bytes held from then on)."""

    @property
    def end_us(self) -> float:
        return max((span.end_us for span in self.spans), default=0.0)


def idle_fractions(panel: Panel) -> tuple[float, ...]:
    """Per rank, the part of the panel's time in which the rank does not compute."""
    busy = [0.0] * panel.num_ranks
    for span in panel.spans:
        if span.kind not in ("wait", "copy"):
            busy[span.rank] += span.end_us - span.start_us
    end_us = panel.end_us
    return tuple(max(0.0, 1.0 - time / end_us) if end_us else 0.0 for time in busy)


def module_colours(panels: Sequence[Panel]) -> dict[str, str]:
    """A colour per module, the same in all pictures of a model.

    In the order of their lowest stages in the first panel that has them (stages of static cuts hold
    layers of several modules); work that belongs to no module comes last.
    """
    order: dict[str, tuple[float, ...]] = {}
    for number, panel in enumerate(panels):
        lowest: dict[str, float] = {}
        for span in panel.spans:
            stage = _STAGE.match(span.action)
            found = int(stage[0]) if stage else math.inf
            lowest[span.module] = min(found, lowest.get(span.module, math.inf))
        for name, found in lowest.items():
            order.setdefault(name, (found == math.inf, number, found))
    names = sorted(order, key=lambda name: (order[name], name))
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def plan_panel(plan: Plan, title: str, simulation: Simulation | None = None) -> Panel:
    """What the simulator expects of ``plan``, with the memory that its activations take."""
    simulation = simulation or simulate(plan)
    spans = [
        Span(
            rank,
            plan.partition[timed.action.stage].module,
            str(timed.action),
            timed.start_us,
            timed.end_us,
            "copy" if timed.action.type.is_copy else timed.action.type.value,  # type: ignore[arg-type]
        )
        for rank, line in enumerate(simulation.timelines)
        for timed in line
        if timed.action.type is not ActionType.RELEASE
    ]
    return Panel(
        title=title,
        spans=spans,
        num_ranks=plan.problem.num_ranks,
        memory=_memory_curves(plan, simulation),
    )


def _memory_curves(plan: Plan, simulation: Simulation) -> dict[int, list[tuple[float, int]]]:
    table = build_task_table(plan.graph, plan.recomputed_layers, plan.offloaded_layers)
    away_bytes = table.away_bytes.tolist()
    stored_bytes = table.stored_bytes.tolist()
    curves: dict[int, list[tuple[float, int]]] = {}
    for rank, line in enumerate(simulation.timelines):
        held = table.static_bytes[rank].item()
        curve = [(0.0, held)]
        for action, start_us, end_us in line:
            number = plan.graph.numbers[Work(action.stage, action.microbatch or 0, action.sub)]
            if action.type is ActionType.FORWARD:
                held += stored_bytes[number]
                curve.append((start_us, held))
            elif action.type is ActionType.RELEASE:
                held -= away_bytes[number]
                curve.append((start_us, held))
            elif action.type is ActionType.RELOAD:
                held += away_bytes[number]
                curve.append((start_us, held))
            elif action.type is ActionType.OFFLOAD:
                continue
            elif action.type is not ActionType.INPUT_GRAD or not table.has_weight_grad[number]:
                held -= stored_bytes[number]
                curve.append((end_us, held))
        curves[rank] = curve
    return curves


def write_timeline(path: str | Path, title: str, panels: Sequence[Panel]) -> None:
    """Write ``panels`` under one another into one self-contained HTML file."""
    # In JSON "<" only occurs inside strings; escaped, no string can end the script element.
    text = json.dumps(timeline_data(panels), separators=(",", ":")).replace("<", "\\u003c")
    page = timeline_template().replace("__TITLE__", html.escape(title))
    Path(path).write_text(page.replace("__DATA__", text), encoding="utf-8")


def timeline_template() -> str:
    """The page, with ``__TITLE__`` and ``__DATA__`` (JSON without "<") to be filled in."""
    template = resources.files("megatron_dip.simulator").joinpath("timeline.html")
    return template.read_text(encoding="utf-8")


def timeline_data(panels: Sequence[Panel]) -> dict[str, Any]:
    """What the page draws."""
    colours = module_colours(panels)
    return {
        "modules": list(colours),
        "colours": list(colours.values()),
        "panels": [_panel_data(panel, list(colours)) for panel in panels],
    }


def _panel_data(panel: Panel, modules: list[str]) -> dict[str, Any]:
    rows: list[list[list[Any]]] = [[] for _ in range(panel.num_ranks)]
    copies: list[list[list[Any]]] = [[] for _ in range(panel.num_ranks)]
    number = {module: index for index, module in enumerate(modules)}
    for span in sorted(panel.spans, key=lambda span: (span.rank, span.start_us)):
        times = [round(span.start_us, 1), round(span.end_us, 1)]
        if span.kind == "copy":
            copies[span.rank].append([*times, number[span.module]])
            continue
        kind = _KINDS.index(span.kind)
        rows[span.rank].append([*times, number[span.module], kind, span.action])
    memory = None
    if panel.memory is not None:
        memory = [
            [[round(time, 1), held] for time, held in panel.memory.get(rank, ())]
            for rank in range(panel.num_ranks)
        ]
    return {
        "title": panel.title,
        "end_us": panel.end_us,
        "idle": idle_fractions(panel),
        "rows": rows,
        "copies": copies,
        "memory": memory,
        "memory_top": max((point[1] for curve in memory or () for point in curve), default=0),
    }
