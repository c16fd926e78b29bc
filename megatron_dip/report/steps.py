"""Records of training steps: what was predicted, what was measured; one JSON line per step."""

from pathlib import Path
from typing import Any

from megatron_dip.errors import DataError
from megatron_dip.forms import Form
from megatron_dip.reading import parse_json, read_text

__all__ = ["RankRecord", "StepRecord", "read_records", "record_path"]


class RankRecord(Form):
    """One pipeline rank in one step."""

    busy_us: float
    """Computing."""
    data_us: float
    """Until the data of the step was at hand."""
    plan_us: float
    """From then until its plan was."""
    static_bytes: int
    """Weights, gradients and optimizer state, as the cost model counts them."""
    predicted_bytes: int
    """Most activations held at a time, by the plan."""
    stored_bytes: int
    """The same, measured; 0 where it was not."""


class StepRecord(Form):
    """One training step of one pipeline."""

    iteration: int
    predicted_us: float
    """Makespan, by the plan."""
    measured_us: float
    """From the plan at hand to the last compute action's end, on the slowest rank."""
    predicted_step_us: float
    """The whole step: the makespan, and what came beside it in the steps before."""
    step_us: float
    """From the begin of the step to that of the next."""
    action_error: float
    """Median part by which predictions of actions were off."""
    tokens: dict[str, int]
    """Per module."""
    num_microbatches: int
    planning: dict[str, Any]
    """Where the plan came from, what it took, what training waited for it."""
    ranks: tuple[RankRecord, ...]

    @property
    def idle_fractions(self) -> tuple[float, ...]:
        """Per rank, the part of the makespan in which it did not compute."""
        if not self.measured_us:
            return tuple(0.0 for _ in self.ranks)
        return tuple(max(0.0, 1.0 - rank.busy_us / self.measured_us) for rank in self.ranks)

    @property
    def error(self) -> float:
        """Part by which the makespan was off; positive: it took longer than predicted."""
        return self.measured_us / self.predicted_us - 1.0 if self.predicted_us else 0.0

    @property
    def step_error(self) -> float:
        """The same of the whole step."""
        return self.step_us / self.predicted_step_us - 1.0 if self.predicted_step_us else 0.0

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


def read_records(folder: str | Path, replica: int = 0) -> list[StepRecord]:
    """All records of a replica, by iteration; of an iteration that was run again, the last.

    Raises:
        DataError: There are none, or a line is none.
    """
    path = record_path(folder, replica)
    if not path.is_file():
        raise DataError(
            f"{folder}: no {path.name} (expected a folder that a run with --dip-schedule and "
            f"--dip-trace-dir has written)"
        )
    found: dict[int, StepRecord] = {}
    for number, line in enumerate(read_text(path, DataError).splitlines(), start=1):
        source = f"{path}, line {number}"
        record = StepRecord.parse(parse_json(line, source, DataError), DataError, source)
        found[record.iteration] = record
    if not found:
        raise DataError(f"{path}: no records (the first is written in the second iteration)")
    return [found[iteration] for iteration in sorted(found)]
