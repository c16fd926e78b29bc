"""The picture of ``scale.py``: what grows with the number of GPUs, on two logarithmic axes."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["draw_scale"]

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 250, 20, 50
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#57606a}"
    ".grid{stroke:#d8dee4;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa4af}.grid{stroke:#2b3037}}"
)
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756")
_SECONDS = (0.001, 100.0)


def draw_scale(results: Mapping[str, Any]) -> str:
    """The SVG."""
    worlds = [int(world) for world in results["setup"]]
    setup, inputs = results["setup"], results["inputs"]
    lines = {
        "Megatron's groups": [setup[str(w)]["megatron"]["seconds"] for w in worlds],
        "groups for transfers": [setup[str(w)]["transfers"]["seconds"] for w in worlds],
        "groups for plans": [setup[str(w)]["plans"]["seconds"] for w in worlds],
        "comparing inputs (rank 0)": [inputs[str(w)]["seconds"] for w in worlds],
        "initial weights (VLM-M)": [results["weights"]["shards"]["rank_s"]] * len(worlds),
    }
    body = _axes(worlds)
    ends = []
    for colour, (name, values) in zip(_COLOURS, lines.items(), strict=True):
        points = [(_x(w, worlds), _y(v)) for w, v in zip(worlds, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        ends.append((points[-1][1], f"{name}: {values[-1]:.2g} s", colour))
    x = _WIDTH - _RIGHT + 12
    for y, label, colour in _apart(ends):
        body.append(f'<text x="{x}" y="{y + 4:.1f}" style="fill:{colour}">{escape(label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _apart(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Labels from top to bottom, none over another."""
    placed: list[tuple[float, str, str]] = []
    for y, label, colour in sorted(ends):
        above = placed[-1][0] + 16 if placed else y
        placed.append((max(y, above), label, colour))
    return placed


def _axes(worlds: Sequence[int]) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    body = []
    low, high = (round(math.log10(end)) for end in _SECONDS)
    for power in range(low, high + 1):
        y = _y(10.0**power)
        body.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        label = f"{10.0**power:g} s"
        body.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for world in worlds:
        x = _x(world, worlds)
        body.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        body.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{world:,}</text>')
    middle = (_LEFT + right) / 2
    body.append(f'<text x="{middle:.0f}" y="{bottom + 38}" text-anchor="middle">GPUs</text>')
    return body


def _x(world: int, worlds: Sequence[int]) -> float:
    share = math.log(world / worlds[0]) / math.log(worlds[-1] / worlds[0])
    return _LEFT + share * (_WIDTH - _RIGHT - _LEFT)


def _y(seconds: float) -> float:
    low, high = _SECONDS
    share = math.log(max(seconds, low) / low) / math.log(high / low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
