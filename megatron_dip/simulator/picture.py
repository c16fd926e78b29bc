"""A still picture of schedules (SVG), for documents."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_dip.simulator.timeline import Panel, Span, idle_fractions, module_colours

__all__ = ["write_picture"]

_WIDTH, _LEFT, _RIGHT = 1000, 62, 76
_ROW, _GAP, _HEAD, _FOOT = 24, 3, 26, 30
_COPY = 5
"""Height of a copy, over the bottom of its rank's row."""
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#57606a}"
    ".title{font-weight:600;fill:#24292f}.idle{fill:#e7e9ec}.backward{fill:#000;fill-opacity:.34}"
    ".copy{fill:#24292f}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa4af}.title{fill:#e6edf3}.idle{fill:#2b3037}"
    ".copy{fill:#e6edf3}}"
)


def write_picture(path: str | Path, panels: Sequence[Panel]) -> None:
    """Write ``panels`` under one another on one time axis; backwards are darker than forwards."""
    colours = module_colours(panels)
    end_us = max((panel.end_us for panel in panels), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / end_us
    body: list[str] = []
    top = 0
    for panel in panels:
        body += _draw_panel(panel, top, scale, colours)
        top += _HEAD + panel.num_ranks * (_ROW + _GAP) + 10
    x = float(_LEFT)
    for module, colour in colours.items():
        for name, extra in (("forward", ""), ("backward", "backward")):
            body.append(_rect(x, top + 6, 16, 12, f'fill="{colour}"'))
            if extra:
                body.append(_rect(x, top + 6, 16, 12, f'class="{extra}"'))
            label = f"{module} {name}"
            body.append(f'<text x="{x + 21:.0f}" y="{top + 16}">{escape(label)}</text>')
            x += 40 + 6.6 * len(label)
    entries = [("idle", 12, 'class="idle"')]
    if any(span.kind == "copy" for panel in panels for span in panel.spans):
        entries.append(("copy to or from the host", _COPY, 'class="copy"'))
    for label, tall, rest in entries:
        body.append(_rect(x, top + 18 - tall, 16, tall, rest))
        body.append(f'<text x="{x + 21:.0f}" y="{top + 16}">{label}</text>')
        x += 40 + 6.6 * len(label)
    height = top + _FOOT
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def _draw_panel(panel: Panel, top: int, scale: float, colours: dict[str, str]) -> list[str]:
    lines = [
        f'<text class="title" x="{_LEFT}" y="{top + 17}">{escape(panel.title)} '
        f"({panel.end_us / 1000:.0f} ms)</text>"
    ]
    idle = idle_fractions(panel)
    for rank in range(panel.num_ranks):
        y = top + _HEAD + rank * (_ROW + _GAP)
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">rank {rank}</text>'
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 16}">idle {idle[rank]:.0%}</text>'
        )
        lines.append(_rect(_LEFT, y, panel.end_us * scale, _ROW, 'class="idle"'))
        # Copies over what computes beside them.
        for span in sorted(panel.spans, key=lambda span: span.kind == "copy"):
            if span.rank == rank and span.kind != "wait":
                lines.append(_draw_span(span, y, scale, colours[span.module]))
    return lines


def _draw_span(span: Span, y: int, scale: float, colour: str) -> str:
    x = _LEFT + span.start_us * scale
    width = (span.end_us - span.start_us) * scale
    width = max(width - min(0.6, width / 4), 0.2)
    if span.kind == "copy":
        return _rect(x, y + _ROW - _COPY, width, _COPY, 'class="copy"')
    drawn = _rect(x, y, width, _ROW, f'fill="{colour}"')
    if span.kind != "F":
        drawn += _rect(x, y, width, _ROW, 'class="backward"')
    return drawn


def _rect(x: float, y: float, width: float, height: float, rest: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{height:.0f}" {rest}/>'
