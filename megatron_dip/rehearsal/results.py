"""What the ranks of a rehearsal are told, what they measure, and how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dip.plan import Action, Plan
from megatron_dip.simulator.timeline import Panel, Span

__all__ = [
    "RankRun",
    "RankTask",
    "Rehearsal",
    "RehearsedSpan",
    "measured_rehearsal_panel",
    "rehearsal_json",
]


class RankTask(NamedTuple):
    """What a rank is to do."""

    rank: int
    plan: Plan
    durations_us: Mapping[Action, float]
    """Of this rank's compute actions."""
    repetitions: int
    timeout_seconds: float
    """Limit of every wait."""
    store: Path
    """File through which the ranks find each other."""


class RehearsedSpan(NamedTuple):
    """One action or wait of a rank; times in microseconds from the common start."""

    action: str
    start_us: float
    end_us: float
    is_wait: bool


class RankRun(NamedTuple):
    """One repetition on one rank."""

    end_us: float
    """End of the last action, in microseconds from the common start."""
    spans: tuple[RehearsedSpan, ...]


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rehearsal measured, beside what was predicted."""

    plan: Plan
    """As it was rehearsed: scaled."""
    predicted_us: float
    predicted_rank_us: tuple[float, ...]
    """Per rank, the end of its last compute action."""
    repetitions: tuple[tuple[RankRun, ...], ...]
    """Per repetition and rank."""

    @property
    def repetitions_us(self) -> tuple[float, ...]:
        """Makespans."""
        return tuple(max(run.end_us for run in runs) for runs in self.repetitions)

    @property
    def median_repetition(self) -> int:
        """Index of the repetition with the median makespan (of an even number, the lower one)."""
        order = sorted(range(len(self.repetitions)), key=lambda index: self.repetitions_us[index])
        return order[(len(order) - 1) // 2]

    @property
    def achieved_us(self) -> float:
        """Median makespan."""
        return self.repetitions_us[self.median_repetition]

    @property
    def achieved_rank_us(self) -> tuple[float, ...]:
        """Per rank, the end of its last compute action in the median repetition."""
        return tuple(run.end_us for run in self.repetitions[self.median_repetition])


def rehearsal_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """The result as a JSON object."""
    return {
        "achieved_us": rehearsal.achieved_us,
        "predicted_us": rehearsal.predicted_us,
        "ratio": rehearsal.achieved_us / rehearsal.predicted_us if rehearsal.predicted_us else None,
        "repetitions_us": list(rehearsal.repetitions_us),
        "ranks": [
            {"rank": rank, "achieved_us": achieved, "predicted_us": predicted}
            for rank, (achieved, predicted) in enumerate(
                zip(rehearsal.achieved_rank_us, rehearsal.predicted_rank_us, strict=True)
            )
        ],
    }


def measured_rehearsal_panel(rehearsal: Rehearsal, title: str) -> Panel:
    """The timeline of the median repetition."""
    partition = rehearsal.plan.partition
    spans = []
    for rank, run in enumerate(rehearsal.repetitions[rehearsal.median_repetition]):
        for span in run.spans:
            action = Action.parse(span.action)
            spans.append(
                Span(
                    rank,
                    partition[action.stage].module,
                    span.action,
                    span.start_us,
                    span.end_us,
                    "wait" if span.is_wait else action.type.value,  # type: ignore[arg-type]
                )
            )
    return Panel(title=title, spans=spans, num_ranks=rehearsal.plan.problem.num_ranks)
