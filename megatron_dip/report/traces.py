"""Traces as ``--dip-trace-dir`` writes them: one JSON line per iteration and rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_dip.errors import DataError
from megatron_dip.reading import parse_json, read_text

__all__ = ["IterationTrace", "RankTrace", "Span", "read_traces"]


class Span(NamedTuple):
    """One piece of work or wait; times in microseconds of the host's monotonic clock."""

    label: str
    start_us: float
    end_us: float
    is_wait: bool

    @property
    def duration_us(self) -> float:
        return self.end_us - self.start_us


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """What one pipeline rank did in one iteration."""

    rank: int
    start_us: float
    end_us: float
    spans: tuple[Span, ...]

    @property
    def busy_us(self) -> float:
        return sum(span.duration_us for span in self.spans if not span.is_wait)


@dataclass(frozen=True, kw_only=True)
class IterationTrace:
    """One iteration of one schedule on all ranks of a pipeline."""

    schedule: str
    """``dip`` or ``stock``."""
    iteration: int
    ranks: tuple[RankTrace, ...]

    @property
    def start_us(self) -> float:
        return min(rank.start_us for rank in self.ranks)

    @property
    def duration_us(self) -> float:
        """From the first rank's start of the schedule to the last rank's end."""
        return max(rank.end_us for rank in self.ranks) - self.start_us

    @property
    def idle_fractions(self) -> tuple[float, ...]:
        """Per rank, the share of the duration in which it neither computed nor loaded data."""
        return tuple(1.0 - rank.busy_us / self.duration_us for rank in self.ranks)


def read_traces(folder: str | Path) -> list[IterationTrace]:
    """All complete iterations in ``folder``, in order.

    Ranks that share a pipeline rank (tensor-parallel peers) did the same: the first one counts.

    Raises:
        DataError: The folder holds no traces, or a line is none.
    """
    folder = Path(folder)
    files = sorted(folder.glob("rank*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no traces (expected rank*.jsonl, written by --dip-trace-dir)")
    found: dict[int, dict[int, RankTrace]] = {}
    schedules: dict[int, str] = {}
    for file in files:
        for number, line in enumerate(read_text(file, DataError).splitlines(), start=1):
            record = parse_json(line, f"{file}, line {number}", DataError)
            try:
                iteration, trace = int(record["iteration"]), _rank_trace(record)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}, line {number}: not a trace ({error})") from error
            found.setdefault(iteration, {}).setdefault(trace.rank, trace)
            schedules[iteration] = record["schedule"]
    num_ranks = max(len(ranks) for ranks in found.values())
    return [
        IterationTrace(
            schedule=schedules[iteration],
            iteration=iteration,
            ranks=tuple(ranks[rank] for rank in sorted(ranks)),
        )
        for iteration, ranks in sorted(found.items())
        if len(ranks) == num_ranks
    ]


def _rank_trace(record: dict[str, object]) -> RankTrace:
    spans = record["spans"]
    if not isinstance(spans, Sequence):
        raise TypeError("spans is no list")
    return RankTrace(
        rank=int(str(record["rank"])),
        start_us=float(str(record["start_us"])),
        end_us=float(str(record["end_us"])),
        spans=tuple(Span(*span) for span in spans),
    )
