"""Charts as SVG text: lines or bars, published figures as marks, names at the right."""

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

__all__ = ["COLOURS", "PUBLISHED", "Axis", "Bars", "Series", "draw_bars", "draw_lines"]

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d")
PUBLISHED = "published"
"""What the marks of published figures are called."""

_WIDTH, _HEIGHT = 820, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 230, 34, 52
_PLOT_RIGHT, _PLOT_BOTTOM = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
_LETTER = 6.4
"""Mean width of a letter."""
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#57606a}"
    ".title{font-weight:600;fill:#24292f}.grid{stroke:#d8dee4;stroke-width:1}"
    ".mark{fill:none;stroke:#24292f;stroke-width:1.6}"
    "@media(prefers-color-scheme:dark){text{fill:#9aa4af}.title{fill:#e6edf3}"
    ".grid{stroke:#2b3037}.mark{stroke:#e6edf3}}"
)

Point = tuple[float, float]


class Axis(NamedTuple):
    """What is along an axis."""

    label: str
    low: float
    high: float
    is_log: bool = False
    ticks: Sequence[float] | None = None
    """Round numbers where not given."""

    def share(self, value: float) -> float:
        """Where ``value`` is, 0 at the low end and 1 at the high one; not beyond them."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = (math.log(max(number, low)) for number in (value, low, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def all_ticks(self) -> Sequence[float]:
        """Those given, or round numbers."""
        if self.ticks is not None:
            return self.ticks
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        for factor in (1, 2, 2.5, 5, 10):
            if (self.high - self.low) / (step * factor) <= 7:
                step *= factor
                break
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


class Series(NamedTuple):
    """One line, or marks of published figures."""

    name: str
    points: Sequence[Point]
    shape: Literal["line", "dotted line", "steps", "marks"] = "line"
    colour: int | None = None
    """Number of its colour; that of its place where not given."""


class Bars(NamedTuple):
    """One bar per category."""

    name: str
    values: Sequence[float | None]
    published: Sequence[float | None] = ()
    """Per category, drawn as marks."""


def draw_lines(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """A chart of ``series``."""
    body = [*_grid(title, x, y), *_x_ticks(x)]
    for number, one in enumerate(series):
        colour = COLOURS[(number if one.colour is None else one.colour) % len(COLOURS)]
        points = [(_x(x.share(a)), _y(y.share(b))) for a, b in one.points]
        if one.shape == "marks":
            body += [_mark(*point, colour) for point in points]
            continue
        if one.shape == "steps":
            points = _stepped(points)
        dashes = ' stroke-dasharray="2 4"' if one.shape == "dotted line" else ""
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
        )
        if one.shape == "line" and len(points) <= 20:
            body += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points
            ]
    names = [
        (
            one.name,
            COLOURS[(number if one.colour is None else one.colour) % len(COLOURS)],
            one.shape,
        )
        for number, one in enumerate(series)
    ]
    return _document([*body, *_legend(names)])


def draw_bars(title: str, categories: Sequence[str], y: Axis, groups: Sequence[Bars]) -> str:
    """Bars side by side for every category, with their values, published figures as marks."""
    body = _grid(title, Axis("", 0, 1), y)
    room = (_PLOT_RIGHT - _LEFT) / len(categories)
    width = min(44.0, room * 0.84 / len(groups))
    for place, category in enumerate(categories):
        middle = _LEFT + (place + 0.5) * room
        body += _wrapped(category, middle, _PLOT_BOTTOM + 18, room)
        for number, group in enumerate(groups):
            left = middle + (number - len(groups) / 2) * width
            value = group.values[place]
            colour = COLOURS[number % len(COLOURS)]
            if value is not None:
                top = _y(y.share(value))
                body.append(
                    f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" '
                    f'height="{_PLOT_BOTTOM - top:.1f}" fill="{colour}"/>'
                )
            published = group.published[place] if group.published else None
            if published is not None:
                body.append(_mark(left + width / 2, _y(y.share(published))))
            if value is not None:
                body.append(_bar_value(value, left, width, _y(y.share(value))))
    names: list[tuple[str, str, str]] = [
        (group.name, COLOURS[number % len(COLOURS)], "bars") for number, group in enumerate(groups)
    ]
    if any(one is not None for group in groups for one in group.published):
        names.append((PUBLISHED, "", "marks"))
    return _document([*body, *_legend(names)])


def _bar_value(value: float, left: float, width: float, top: float) -> str:
    """Inside the bar at its foot, where no mark is, upright where the bar is narrower than the
    number; above a bar that is too low for it."""
    middle, text = left + width / 2, f"{value:.2f}"
    is_narrow = width < len(text) * _LETTER
    if _PLOT_BOTTOM - top <= (34 if is_narrow else 24):
        place, style = f'x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle"', ""
    elif is_narrow:
        place = f'transform="translate({middle + 4:.1f} {_PLOT_BOTTOM - 6}) rotate(-90)"'
        style = "fill:#fff;"
    else:
        place = f'x="{middle:.1f}" y="{_PLOT_BOTTOM - 8:.1f}" text-anchor="middle"'
        style = "fill:#fff;"
    return f'<text {place} style="{style}font-size:11px">{text}</text>'


def _document(body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}">\n<style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _grid(title: str, x: Axis, y: Axis) -> list[str]:
    body = [f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>']
    for value in y.all_ticks():
        place = _y(y.share(value))
        body.append(
            f'<line class="grid" x1="{_LEFT}" y1="{place:.1f}" x2="{_PLOT_RIGHT}" '
            f'y2="{place:.1f}"/>'
        )
        body.append(
            f'<text x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{value:,g}</text>'
        )
    middle_x, middle_y = (_LEFT + _PLOT_RIGHT) / 2, (_TOP + _PLOT_BOTTOM) / 2
    body.append(
        f'<text x="{middle_x:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x.label)}</text>'
    )
    body.append(
        f'<text transform="translate(18 {middle_y:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    return body


def _x_ticks(x: Axis) -> list[str]:
    body = []
    for value in x.all_ticks():
        place = _x(x.share(value))
        body.append(
            f'<line class="grid" x1="{place:.1f}" y1="{_PLOT_BOTTOM}" x2="{place:.1f}" '
            f'y2="{_PLOT_BOTTOM + 5}"/>'
        )
        body.append(
            f'<text x="{place:.1f}" y="{_PLOT_BOTTOM + 18}" text-anchor="middle">{value:,g}</text>'
        )
    return body


def _legend(names: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names with what stands for them, from top to bottom."""
    left, y = _PLOT_RIGHT + 16, _TOP + 6
    body = []
    for name, colour, shape in names:
        if shape == "marks":
            body.append(_mark(left + 8, y, colour))
        elif shape == "bars":
            body.append(f'<rect x="{left}" y="{y - 6}" width="16" height="12" fill="{colour}"/>')
        else:
            dashes = ' stroke-dasharray="2 4"' if shape == "dotted line" else ""
            body.append(
                f'<line x1="{left}" y1="{y}" x2="{left + 16}" y2="{y}" stroke="{colour}" '
                f'stroke-width="2.5"{dashes}/>'
            )
        lines = _lines_of(name, _RIGHT - 50)
        body += [
            f'<text x="{left + 22}" y="{y + 4 + 15 * number}">{escape(line)}</text>'
            for number, line in enumerate(lines)
        ]
        y += 15 * len(lines) + 8
    return body


def _wrapped(text: str, middle: float, y: float, room: float) -> list[str]:
    return [
        f'<text x="{middle:.1f}" y="{y + 14 * number:.0f}" text-anchor="middle">{escape(line)}'
        "</text>"
        for number, line in enumerate(_lines_of(text, room - 12))
    ]


def _lines_of(text: str, room: float) -> list[str]:
    """``text`` in lines of at most ``room``; words stay whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and (len(lines[-1]) + 1 + len(word)) * _LETTER <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _mark(x: float, y: float, colour: str = "") -> str:
    """A diamond."""
    style = f' style="stroke:{colour}"' if colour else ""
    return f'<path class="mark" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"{style}/>'


def _stepped(points: Sequence[Point]) -> list[Point]:
    """Level until the next point."""
    found: list[Point] = []
    for point in points:
        if found:
            found.append((point[0], found[-1][1]))
        found.append(point)
    return found


def _x(share: float) -> float:
    return _LEFT + share * (_PLOT_RIGHT - _LEFT)


def _y(share: float) -> float:
    return _PLOT_BOTTOM - share * (_PLOT_BOTTOM - _TOP)
