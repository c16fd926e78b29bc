"""Timelines as text: ranks as rows, time as columns of equal length, a letter per module.

A column shows what its rank does for most of the column's time, so that long batches stay readable;
what is shorter than half a column may not appear.  All panels share one time axis.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dip.errors import ConfigError
from megatron_dip.simulator.timeline import Panel, idle_fractions, module_colours

__all__ = ["MIN_WIDTH", "text_timeline"]

MIN_WIDTH = 40
"""Characters per line: a timeline of fewer would show nothing."""

_IDLE, _OTHER = ".", "+"


def text_timeline(panels: Sequence[Panel], width: int) -> str:
    """``panels`` under one another, their rows of ``width`` characters.

    A module has an upper-case letter for its forwards and the same in lower case for its backwards,
    both halves of split ones included; the legend names them.  Copies to and from the host are not
    shown.

    Raises:
        ConfigError: ``width`` is below MIN_WIDTH.
    """
    if width < MIN_WIDTH:
        raise ConfigError(f"text timeline of {width} columns (expected at least {MIN_WIDTH})")
    letters = _letters(list(module_colours(panels)))
    end_us = max((panel.end_us for panel in panels), default=0.0)
    num_digits = len(str(max((panel.num_ranks for panel in panels), default=1) - 1))
    margin = len(f"rank {'':{num_digits}} ")
    num_columns = width - margin - len(" idle 100%")
    lines: list[str] = []
    for panel in panels:
        idle = idle_fractions(panel)
        lines.append(f"{panel.title} ({panel.end_us / 1000:.1f} ms)")
        for rank, row in enumerate(_rows(panel, letters, num_columns, end_us)):
            lines.append(f"rank {rank:>{num_digits}} {row} idle {idle[rank]:4.0%}")
        lines.append("")
    end = f"{end_us / 1000:.1f} ms"
    lines.append(f"{'':{margin}}{'0':<{num_columns - len(end)}}{end}")
    lines.append(_legend(panels, letters, end_us / num_columns))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _letters(modules: Sequence[str]) -> dict[str, str]:
    """A capital per module: of its name if one is free, else any."""
    found: dict[str, str] = {}
    for module in modules:
        candidates = [*module.upper(), *map(chr, range(ord("A"), ord("Z") + 1))]
        free = [c for c in candidates if "A" <= c <= "Z" and c not in found.values()]
        if not free:
            raise ConfigError(f"text timeline: {len(modules)} modules, but 26 letters")
        found[module] = free[0]
    return found


def _rows(panel: Panel, letters: Mapping[str, str], num_columns: int, end_us: float) -> list[str]:
    """A string of ``num_columns`` characters per rank; blank after the panel's end."""
    symbols = [_IDLE, _OTHER, *letters.values(), *(letter.lower() for letter in letters.values())]
    column_us = end_us / num_columns or 1.0
    starts_us = np.arange(num_columns) * column_us
    time_us = np.zeros((panel.num_ranks, len(symbols), num_columns))
    for span in panel.spans:
        if span.kind in ("wait", "copy"):
            continue
        symbol = _OTHER
        if span.kind != "other":
            letter = letters[span.module]
            symbol = letter if span.kind == "F" else letter.lower()
        first = int(span.start_us / column_us)
        last = min(int(span.end_us / column_us), num_columns - 1) + 1
        begins = np.maximum(starts_us[first:last], span.start_us)
        ends = np.minimum(starts_us[first:last] + column_us, span.end_us)
        time_us[span.rank, symbols.index(symbol), first:last] += np.maximum(ends - begins, 0.0)
    time_us[:, 0] = column_us - time_us[:, 1:].sum(axis=1)
    most = time_us.argmax(axis=1)
    used = int(np.ceil(panel.end_us / column_us))
    return [
        "".join(symbols[index] for index in row[:used]).ljust(num_columns) for row in most.tolist()
    ]


def _legend(panels: Sequence[Panel], letters: Mapping[str, str], column_us: float) -> str:
    parts = [f"{letter}/{letter.lower()} {module}" for module, letter in letters.items()]
    parts.append(f"{_IDLE} idle")
    if any(span.kind == "other" for panel in panels for span in panel.spans):
        parts.append(f"{_OTHER} other")
    return f"forward/backward: {', '.join(parts)}; a column is {column_us / 1000:.2f} ms"
