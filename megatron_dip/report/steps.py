"""Records of training steps: what was predicted, what was measured; one JSON line per step."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_dip.errors import DataError
from megatron_dip.forms import Form
from megatron_dip.report.lines import LeftOut, read_lines, say_left_out, superseded

__all__ = ["AssignmentRecord", "RankRecord", "StepRecord", "read_records", "record_path"]


# Far more than can be measured, and little enough to reckon with.
Measured = Annotated[float, Field(ge=-1e290, le=1e290)]
_LEAST_US = 1e-6
Amount = Annotated[int, Field(ge=-(2**62), le=2**62)]


class RankRecord(Form):
    """One pipeline rank in one step."""

    busy_us: Measured
    """Computing."""
    data_us: Measured
    """Until the data of the step was at hand."""
    plan_us: Measured
    """From then until its plan was."""
    static_bytes: Amount
    """Weights, gradients and optimizer state, as the cost model counts them."""
    predicted_bytes: Amount
    """Most activations held at a time, by the plan."""
    stored_bytes: Amount
    """The same, measured; 0 where it was not."""


class AssignmentRecord(Form):
    """What the assignment of a global batch moved, by stated costs."""

    num_moved: Amount
    """Microbatches or samples that are now in another place."""
    num_groups: Amount
    """Of so many."""
    replicas: tuple[Measured, Measured]
    """The most that a replica has to do over the mean of replicas, before and after."""
    microbatches: tuple[Measured, Measured]
    """The same of microbatches."""

    def numbers(self) -> dict[str, float]:
        """For writers of curves."""
        return {
            "num_moved": self.num_moved,
            "slowest_replica_given": self.replicas[0],
            "slowest_replica_assigned": self.replicas[1],
        }

    def summary(self) -> str:
        """For a log."""
        return (
            f"{self.num_moved} of {self.num_groups} moved; most work over the mean: replicas "
            f"{self.replicas[0]:.2f} -> {self.replicas[1]:.2f}, microbatches "
            f"{self.microbatches[0]:.2f} -> {self.microbatches[1]:.2f}"
        )


class StepRecord(Form):
    """One training step of one pipeline."""

    iteration: Annotated[int, Field(ge=0, le=2**53)]
    predicted_us: Measured
    """Makespan, by the plan."""
    measured_us: Measured
    """From the plan at hand to the last compute action's end, on the slowest rank."""
    predicted_step_us: Measured
    """The whole step: the makespan, and what came beside it in the steps before."""
    step_us: Measured
    """From the begin of the step to that of the next."""
    action_error: Measured
    """Median part by which predictions of actions were off."""
    tokens: dict[str, Amount]
    """Per module."""
    num_microbatches: Amount
    planning: dict[str, Any]
    """Where the plan came from, what it took, what training waited for it."""
    ranks: tuple[RankRecord, ...]
    assignment: AssignmentRecord | None = None
    """What moved before the batch was planned; None where nothing was to move."""
    run: str = ""
    """The start of the run that it belongs to; earlier versions wrote none."""

    @property
    def idle_fractions(self) -> tuple[float, ...]:
        """Per rank, the part of the makespan in which it did not compute."""
        if self.measured_us <= 0.0:
            return tuple(0.0 for _ in self.ranks)
        return tuple(max(0.0, 1.0 - rank.busy_us / self.measured_us) for rank in self.ranks)

    @property
    def error(self) -> float:
        """Part by which the makespan was off; positive: it took longer than predicted."""
        return self.measured_us / self.predicted_us - 1.0 if self.predicted_us > _LEAST_US else 0.0

    @property
    def step_error(self) -> float:
        """The same of the whole step."""
        return (
            self.step_us / self.predicted_step_us - 1.0
            if self.predicted_step_us > _LEAST_US
            else 0.0
        )

    def numbers(self) -> dict[str, float]:
        """For writers of curves."""
        return {
            "predicted_ms": self.predicted_us / 1000,
            "measured_ms": self.measured_us / 1000,
            "prediction_error": self.error,
            "action_error": self.action_error,
            "plan_wait_ms": max(rank.plan_us for rank in self.ranks) / 1000,
            **{f"idle_rank{rank}": idle for rank, idle in enumerate(self.idle_fractions)},
            **{
                f"activation_mib_rank{number}": rank.stored_bytes / 2**20
                for number, rank in enumerate(self.ranks)
                if rank.stored_bytes
            },
            **(self.assignment.numbers() if self.assignment is not None else {}),
        }

    def summary(self) -> str:
        """One line for a log."""
        idle = " ".join(f"{idle:.1%}" for idle in self.idle_fractions)
        waited_ms = max(rank.plan_us for rank in self.ranks) / 1000
        return (
            f"dip: iteration {self.iteration} | predicted {self.predicted_us / 1000:.1f} ms | "
            f"measured {self.measured_us / 1000:.1f} ms ({self.error:+.1%}) | actions off by "
            f"{self.action_error:.1%} | idle per rank {idle} | until the plan {waited_ms:.1f} ms"
        )


def record_path(folder: str | Path, replica: int) -> Path:
    """The file of one data-parallel replica."""
    return Path(folder) / f"steps-replica{replica}.jsonl"


def read_records(
    folder: str | Path, replica: int = 0, left_out: LeftOut = say_left_out
) -> list[StepRecord]:
    """The records of a replica, by iteration.

    Damaged lines are left out, and of several starts that wrote into the folder what a later one
    ran again.

    Args:
        left_out: Is told what was left out.

    Raises:
        DataError: There are none.
    """
    path = record_path(folder, replica)
    if not path.is_file():
        raise DataError(
            f"{folder}: no {path.name} (expected a folder that a run with --dip-schedule and "
            f"--dip-trace-dir has written)"
        )
    damaged: list[str] = []
    runs = _by_run(read_lines(path, _parse_record, damaged.append))
    for line in damaged:
        left_out(line)
    if not runs:
        reason = damaged[0] if damaged else "the first is written in the second iteration"
        raise DataError(f"{path}: no records ({reason})")
    ends = superseded({name: min(records) for name, records in runs.items()})
    found: dict[int, StepRecord] = {}
    for name, records in runs.items():
        end = ends.get(name)
        again = [iteration for iteration in records if end is not None and iteration >= end]
        if again:
            left_out(
                f"{path}: {len(again)} records of run {name} from iteration {min(again)} on, which "
                f"a later run ran again: left out"
            )
        found |= {number: record for number, record in records.items() if number not in set(again)}
    return [found[iteration] for iteration in sorted(found)]


def _by_run(records: Iterable[StepRecord]) -> dict[str, dict[int, StepRecord]]:
    """By run, in the order of their starts, and iteration; of one that was run twice the last.

    Records that name no run begin another one wherever their iterations do not grow.
    """
    runs: dict[str, dict[int, StepRecord]] = {}
    num_unnamed, last = 0, 0
    for record in records:
        name = record.run
        if not name:
            if record.iteration <= last or not num_unnamed:
                num_unnamed += 1
            last = record.iteration
            name = f"number {num_unnamed}"
        runs.setdefault(name, {})[record.iteration] = record
    return runs


def _parse_record(data: Any) -> StepRecord:
    """
    Raises:
        DataError: It is no record, or none that can be drawn.
    """
    record = StepRecord.parse(data, DataError)
    if not record.ranks or not record.tokens or record.step_us <= _LEAST_US:
        raise DataError("a record without ranks, tokens or time")
    return record
