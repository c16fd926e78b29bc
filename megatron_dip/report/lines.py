"""Files of one JSON object per line, some of whose lines may be damaged, and which of them count.

Several starts of a run may write into one folder.  A later one goes on from some iteration: what
earlier ones wrote of that iteration and of later ones no longer belongs to the run.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError, one_line
from megatron_dip.reading import decode_text, parse_json, read_content

__all__ = ["LeftOut", "read_lines", "say_left_out", "superseded"]

LeftOut = Callable[[str], None]
"""Is told in a line what a report leaves out."""

_LONGEST_REASON = 200

logger = logging.getLogger(__name__)


def say_left_out(what: str) -> None:
    """Into the log."""
    logger.warning("%s", what)


def read_lines[ValueT](
    path: Path, parse: Callable[[Any], ValueT], left_out: LeftOut = say_left_out
) -> Iterator[ValueT]:
    """What ``parse`` makes of the lines of ``path``; lines that are damaged are left out.

    Args:
        parse: Raises ``ValueError``, ``LookupError`` or ``TypeError`` for a line of another form.

    Raises:
        DataError: The file cannot be read.
    """
    lines = read_content(path, DataError).split(b"\n")
    damaged: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = parse(parse_json(decode_text(line, "it is", DataError), "it is", DataError))
        except (ValueError, LookupError, TypeError) as error:
            reason = one_line(str(error), _LONGEST_REASON).removeprefix("it is: ")
            damaged.append(f"line {number} ({reason})")
            continue
        yield value
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        left_out(f"{path}, {damaged[0]}{more}: damaged, left out")


def superseded(first_iterations: Mapping[str, int]) -> dict[str, int]:
    """From which iteration on a later start has taken the place of a run; absent: never.

    Args:
        first_iterations: By name of the run, in the order of their starts.
    """
    names = list(first_iterations)
    return {
        name: min(first_iterations[later] for later in names[place + 1 :])
        for place, name in enumerate(names[:-1])
    }
