"""What an experiment hands back, and where it is written."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

__all__ = ["Result", "markdown", "tracked", "write_page", "write_result"]


class Result(NamedTuple):
    """Of one experiment."""

    data: dict[str, Any]
    """Every number, for other programs."""
    table: str
    """Markdown."""
    picture: str
    """SVG."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tracked[T](steps: Sequence[T], what: str) -> Iterable[T]:
    """``steps`` with a progress bar on stderr."""
    return track(steps, what, console=Console(stderr=True), transient=True)


def write_result(folder: Path, name: str, result: Result) -> None:
    """Three files named ``name`` in ``folder``: JSON, markdown and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.data, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(result.table + "\n", encoding="utf-8")
    (folder / f"{name}.svg").write_text(result.picture, encoding="utf-8")


def write_page(page: Path, name: str, result: Result) -> None:
    """Put the table of ``name`` between its two marks in ``page``.

    Raises:
        SystemExit: The page has no such marks.
    """
    before, after = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = page.read_text(encoding="utf-8")
    start, end = text.find(before), text.find(after)
    if start < 0 or end < start:
        raise SystemExit(f"{page} has no place for {name} (expected {before!r} and {after!r})")
    text = text[: start + len(before)] + result.table + "\n" + text[end:]
    page.write_text(text, encoding="utf-8")
