"""The table and the picture of ``replicas.py``."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["WAYS", "draw_replicas", "table_of"]

WAYS = {
    "neither": ("static", "as given"),
    "assignment alone": ("static", "assigned"),
    "plans alone": ("planned", "as given"),
    "both, whole microbatches": ("planned", "whole microbatches"),
    "both": ("planned", "assigned"),
}
_COLOURS = ("#8c959f", "#f58518", "#4c78a8", "#b279a2", "#54a24b")
_WIDTH, _PANEL, _TOP, _LEFT = 860, 150, 56, 60
_BOTTOM, _GAP = 54, 30
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#57606a}"
    ".grid{stroke:#d8dee4;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa4af}.grid{stroke:#2b3037}}"
)
_LEAST = 0.4
"""Where the axis of utilisation begins."""

Rows = Sequence[Mapping[str, Any]]


def _found(
    rows: Rows, model: str, replicas: int, has_limit: bool, way: str
) -> Mapping[str, Any] | None:
    """The row of one way, where it was measured."""
    schedule, batches = WAYS[way]
    if replicas == 1 and batches == "whole microbatches":
        return None
    for row in rows:
        key = (row["model"], row["replicas"], row["limit"], row["schedule"], row["batches"])
        if key == (model, replicas, has_limit, schedule, batches):
            return row
    return None


def _values(rows: Rows, name: str) -> list[Any]:
    found = dict.fromkeys(row[name] for row in rows)
    return list(found) if name == "model" else sorted(found)


def table_of(rows: Rows) -> str:
    """Markdown: utilisation of the whole, and in brackets the slowest over the mean; a star where
    plans are the best of fewer schedules than in other rows."""
    most = max(row.get("evaluations", 0) for row in rows)
    lines = [
        "| model | memory | replicas | " + " | ".join(WAYS) + " |",
        "|---" * (3 + len(WAYS)) + "|",
    ]
    for model in _values(rows, "model"):
        for has_limit in (True, False):
            for replicas in _values(rows, "replicas"):
                cells = []
                for way in WAYS:
                    row = _found(rows, model, replicas, has_limit, way)
                    if row is None or "utilisation" not in row:
                        cells.append("-" if row is None else "over the limit")
                        continue
                    slowest = row["slowest_us"] / row["mean_us"] - 1
                    star = "\\*" if row.get("evaluations", most) < most else ""
                    cells.append(f"{row['utilisation']:.3f} ({slowest:.1%}){star}")
                if set(cells) == {"-"}:
                    continue
                memory = "80 GB" if has_limit else "no limit"
                name = model.upper().replace("_", "-")
                lines.append(f"| {name} | {memory} | {replicas} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_replicas(rows: Rows) -> str:
    """The SVG: a panel per model and limit, bars of utilisation by the number of replicas."""
    models, counts = _values(rows, "model"), _values(rows, "replicas")
    height = _TOP + len(models) * (_PANEL + _BOTTOM)
    half = (_WIDTH - _LEFT - _GAP) / 2
    body = []
    x = float(_LEFT)
    for colour, way in zip(_COLOURS, WAYS, strict=True):
        body.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{x + 17}" y="18">{escape(way)}</text>')
        x += 40 + 7.2 * len(way)
    for line, model in enumerate(models):
        top = _TOP + line * (_PANEL + _BOTTOM)
        for column, has_limit in enumerate((True, False)):
            left = _LEFT + column * (half + _GAP)
            title = f"{model.upper().replace('_', '-')}, {'80 GB' if has_limit else 'no limit'}"
            body.append(f'<text x="{left}" y="{top - 8}" style="font-weight:600">{title}</text>')
            body += _grid(left, top, half, column == 0)
            for place, replicas in enumerate(counts):
                width = half / len(counts)
                middle = left + (place + 0.5) * width
                label = f"{replicas} replica{'s' if replicas > 1 else ''}"
                body.append(
                    f'<text x="{middle:.1f}" y="{top + _PANEL + 16}" text-anchor="middle">'
                    f"{label}</text>"
                )
                body += _bars(rows, model, replicas, has_limit, left + place * width, width, top)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _y(value: float, top: float) -> float:
    return top + _PANEL * (1 - (max(value, _LEAST) - _LEAST) / (1 - _LEAST))


def _grid(left: float, top: float, width: float, is_labelled: bool) -> list[str]:
    lines = []
    for tenth in range(round(10 * _LEAST), 11):
        y = _y(tenth / 10, top)
        lines.append(
            f'<line class="grid" x1="{left}" x2="{left + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        if is_labelled:
            lines.append(
                f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>'
            )
    return lines


def _bars(
    rows: Rows, model: str, replicas: int, has_limit: bool, left: float, width: float, top: float
) -> list[str]:
    bars = []
    step = 0.84 * width / len(WAYS)
    for place, (colour, way) in enumerate(zip(_COLOURS, WAYS, strict=True)):
        row = _found(rows, model, replicas, has_limit, way)
        if row is not None and "utilisation" in row:
            y = _y(row["utilisation"], top)
            bars.append(
                f'<rect x="{left + 0.08 * width + place * step:.1f}" y="{y:.1f}" '
                f'width="{0.9 * step:.1f}" height="{top + _PANEL - y:.1f}" fill="{colour}">'
                f"<title>{escape(way)}: {row['utilisation']:.3f}</title></rect>"
            )
    return bars
