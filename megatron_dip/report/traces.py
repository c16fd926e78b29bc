"""Traces as ``--dip-trace-dir`` writes them: one JSON line per iteration and rank."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dip.errors import DataError, DipError, PlanError, shown
from megatron_dip.plan import Action, Plan, load_plan
from megatron_dip.plan.plan import plan_path
from megatron_dip.report.lines import LeftOut, read_lines, say_left_out, superseded

__all__ = ["IterationTrace", "PlanFile", "RankTrace", "Span", "plan_of_trace", "read_traces"]

_LIMIT = 2**53
"""Of all numbers: floats are whole numbers up to here."""


class Span(NamedTuple):
    """One piece of work or wait; times in microseconds of the host's monotonic clock."""

    label: str
    start_us: float
    end_us: float
    is_wait: bool
    is_device: bool = False
    """Measured by events of a device, where the rank has one; see ``runtime.timeline``."""

    @property
    def duration_us(self) -> float:
        return self.end_us - self.start_us

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy to or from the host, which goes on beside the rest."""
        try:
            return Action.parse(self.label).type.is_copy
        except PlanError:
            return False


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """What one pipeline rank did in one iteration."""

    rank: int
    start_us: float
    end_us: float
    spans: tuple[Span, ...]

    @property
    def busy_us(self) -> float:
        return sum(span.duration_us for span in self.spans if not span.is_wait and not span.is_copy)


class PlanFile(NamedTuple):
    """The file of a plan, beside the traces."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class IterationTrace:
    """One iteration of one schedule on all ranks of a pipeline."""

    schedule: str
    """``dip`` or ``stock``."""
    iteration: int
    ranks: tuple[RankTrace, ...]
    run: str = ""
    """The start of the run that it belongs to; earlier versions wrote none."""
    replica: int = 0
    plan: PlanFile | None = None
    """Its plan, where the run named it."""

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


class _Line(NamedTuple):
    schedule: str
    iteration: int
    run: str
    replica: int | None
    """None in lines of earlier versions."""
    num_ranks: int | None
    plan: PlanFile | None
    trace: RankTrace


def read_traces(
    folder: str | Path, replica: int = 0, left_out: LeftOut = say_left_out
) -> list[IterationTrace]:
    """All complete iterations of a replica in ``folder``, in order.

    Ranks that share a pipeline rank (tensor-parallel peers) did the same: the first one counts.
    Damaged lines are left out, and of several starts that wrote into the folder what a later one
    ran again.

    Args:
        left_out: Is told what was left out.

    Raises:
        DataError: The folder holds no traces.
    """
    folder = Path(folder)
    files = sorted(folder.glob("rank*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no traces (expected rank*.jsonl, written by --dip-trace-dir)")
    damaged: list[str] = []
    found: dict[str, dict[int, dict[int, _Line]]] = {}
    for file in files:
        # Of an iteration that was run twice, the last: what a later file adds are peers.
        own = {
            (line.run, line.iteration): line
            for line in read_lines(file, _parse_line, damaged.append)
            if line.replica in (None, replica)
        }
        for (run, iteration), line in own.items():
            ranks = found.setdefault(run, {}).setdefault(iteration, {})
            ranks.setdefault(line.trace.rank, line)
    for text in damaged:
        left_out(text)
    if not found:
        reason = damaged[0] if damaged else f"none of replica {replica}"
        raise DataError(f"{folder}: no traces ({reason})")
    return _of_last_runs(folder, replica, dict(sorted(found.items())), left_out)


def _of_last_runs(
    folder: Path,
    replica: int,
    runs: Mapping[str, Mapping[int, Mapping[int, _Line]]],
    left_out: LeftOut,
) -> list[IterationTrace]:
    ends = superseded({run: min(iterations) for run, iterations in runs.items()})
    traces = []
    for run, iterations in runs.items():
        most = max(map(len, iterations.values()))
        again = []
        for iteration, ranks in iterations.items():
            if run in ends and iteration >= ends[run]:
                again.append(iteration)
            elif len(ranks) == (next(iter(ranks.values())).num_ranks or most):
                traces.append(_joined([ranks[rank] for rank in sorted(ranks)], replica))
        if again:
            name = f"run {run}" if run else "an unnamed run"
            left_out(
                f"{folder}: {len(again)} timelines of {name} from iteration {min(again)} on, which "
                f"a later run ran again: left out"
            )
    return sorted(traces, key=lambda trace: trace.iteration)


def _joined(lines: list[_Line], replica: int) -> IterationTrace:
    first = lines[0]
    return IterationTrace(
        schedule=first.schedule,
        iteration=first.iteration,
        ranks=tuple(line.trace for line in lines),
        run=first.run,
        replica=replica,
        plan=next((line.plan for line in lines if line.plan), None),
    )


def _parse_line(data: Any) -> _Line:
    """
    Raises:
        ValueError: A value is out of range.
        LookupError: A field is missing.
        TypeError: A field is of another type.
    """
    if not isinstance(data, dict):
        raise TypeError("not an object")
    plan = data.get("plan")
    replica, num_ranks = data.get("replica"), data.get("num_ranks")
    is_device = data.get("is_device", False)
    if not isinstance(is_device, bool):
        raise TypeError(f"is_device is {shown(is_device)}")
    spans = tuple(_parse_span(*span, is_device=is_device) for span in data["spans"])
    trace = RankTrace(
        rank=_whole(data["rank"]),
        start_us=_time(data["start_us"]),
        end_us=_time(data["end_us"]),
        spans=spans,
    )
    if not trace.end_us > trace.start_us:
        raise ValueError(f"ends at {trace.end_us}, before it begins")
    return _Line(
        schedule=str(data["schedule"]),
        iteration=_whole(data["iteration"]),
        run=str(data.get("run", "")),
        replica=None if replica is None else _whole(replica),
        num_ranks=None if num_ranks is None else _whole(num_ranks),
        plan=None if plan is None else PlanFile(str(plan["file"]), str(plan["sha256"])),
        trace=trace,
    )


def _parse_span(
    label: object, start_us: object, end_us: object, is_wait: object, *, is_device: bool
) -> Span:
    if not isinstance(label, str) or not isinstance(is_wait, bool):
        raise TypeError(f"not a span: {shown(label)}")
    return Span(label, _time(start_us), _time(end_us), is_wait, is_device)


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:
        raise ValueError(f"{shown(value)} is not a whole number from 0 to {_LIMIT}")
    return value


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not abs(value) <= _LIMIT:
        raise ValueError(f"{shown(value)} is not a time in microseconds")
    return float(value)


def plan_of_trace(folder: str | Path, trace: IterationTrace) -> Plan:
    """The plan that ``trace`` followed.

    Raises:
        DataError: There is none in ``folder``, or the one there is damaged or of another run.
    """
    path = plan_path(folder, trace.replica, trace.iteration)
    where = f"{path}: the plan of iteration {trace.iteration}"
    if trace.plan is not None:
        path = Path(folder) / Path(trace.plan.name).name
        try:
            is_own = hashlib.sha256(path.read_bytes()).hexdigest() == trace.plan.sha256
        except OSError as error:
            raise DataError(f"{where} cannot be read ({error.strerror})") from error
        if not is_own:
            raise DataError(f"{where} is damaged or was written by another run")
    try:
        plan = load_plan(path)
    except DipError as error:
        raise DataError(f"{where} cannot be used: {error}") from error
    done = [
        [
            span.label
            for span in rank.spans
            if not span.is_wait and span.label[:1].isdigit() and not span.is_copy
        ]
        for rank in trace.ranks
    ]
    meant = [[str(a) for a in line if a.type.is_compute] for line in plan.actions]
    if list(map(sorted, done)) != list(map(sorted, meant)):
        raise DataError(f"{where} is not what its timeline shows: it belongs to another run")
    return plan
