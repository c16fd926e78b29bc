"""The runs that the equality tests compare: one data set and one checkpoint, many layouts.

Every run is made once and kept for the session, because several tests read the same ones.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tiny_vlm import make_tiny_data, write_config
from training_runs import TrainingRun, train

from megatron_dip.plan import Plan, load_plan

__all__ = [
    "ADAM",
    "DP2_PP2",
    "MEAN",
    "NUM_ITERATIONS",
    "ONE_STEP",
    "PER_TOKEN",
    "PP1",
    "PP2",
    "PP4",
    "SGD",
    "TP2_PP2",
    "Case",
    "Cut",
    "Layout",
    "Runs",
    "largest_difference",
    "rounding",
]

NUM_ITERATIONS = 20
MICRO_BATCH_SIZE = 2
SGD = "--optimizer sgd --lr 0.03 --min-lr 0.03"
ADAM = "--optimizer adam --lr 0.002 --min-lr 0.002"
# The first iteration changes the weights, the others leave them: nothing can drift apart.
ONE_STEP = "--optimizer sgd --lr 0.03 --min-lr 0 --lr-decay-style linear --lr-decay-iters 1"
MEAN = ""
PER_TOKEN = "--calculate-per-token-loss"


@dataclass(frozen=True)
class Layout:
    """Ranks and how Megatron shares them out."""

    name: str
    num_pipeline_ranks: int
    num_processes: int
    arguments: str


PP1 = Layout("pp1", 1, 1, "--pipeline-model-parallel-size 1")
PP2 = Layout("pp2", 2, 2, "--pipeline-model-parallel-size 2")
PP4 = Layout("pp4", 4, 4, "--pipeline-model-parallel-size 4")
TP2_PP2 = Layout(
    "tp2-pp2",
    2,
    4,
    "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
)
DP2_PP2 = Layout("dp2-pp2", 2, 4, "--pipeline-model-parallel-size 2")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What ``--dip-schedule`` runs: segments of both modules, and the size of their parts."""

    num_segments: int
    vision_tokens: int | None = None
    """Most tokens in a sub-microbatch; microbatches stay whole where not given."""
    language_tokens: int | None = None
    layers: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()
    """Layers per module, segment and rank; even where not given."""
    planner: str = "dual_queue"
    hardware_queues: str = "auto"

    @classmethod
    def split(cls, num_segments: int, planner: str = "dual_queue") -> "Cut":
        """Sequences one by one, images by twos or threes."""
        return cls(num_segments=num_segments, vision_tokens=90, language_tokens=96, planner=planner)

    @property
    def is_split(self) -> bool:
        return self.vision_tokens is not None

    def config(self, path: Path, data: Path, num_ranks: int) -> Path:
        """Written to ``path``."""
        return write_config(
            path,
            data,
            num_ranks=num_ranks,
            num_segments=self.num_segments,
            sub_microbatch_tokens=(self.vision_tokens, self.language_tokens),
            layers=dict(self.layers) or None,
            planner=self.planner,
            hardware_queues=self.hardware_queues,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run; without a cut it has Megatron's own schedule."""

    layout: Layout
    cut: Cut | None = None
    arguments: str
    """Optimizer, loss mode and what else both schedules are given."""
    own_arguments: str = ""
    """What only this run is given."""
    saves: bool = False
    """Whether it writes a checkpoint in the middle."""
    resumes: "Case | None" = None
    """The run whose middle checkpoint this one goes on from; else all start from the same one."""

    def under(self, cut: Cut | None, own_arguments: str = "", saves: bool = False) -> "Case":
        """The same with another schedule."""
        return replace(self, cut=cut, own_arguments=own_arguments, saves=saves)


class Runs:
    """Makes runs in ``folder`` as they are asked for.

    All of them but the very first load the weights that that one has saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._weights = folder / "weights"
        self._numbers: dict[Case, int] = {}
        make_tiny_data(self._data)
        self.of = cache(self._make)
        start = f"--train-iters 2 --save {self._weights} --save-interval 2 --no-save-optim"
        config = Cut(num_segments=1).config(folder / "first.yaml", self._data, 1)
        first = ("--dip-config", str(config), *_arguments(f"{ADAM} {start} --eval-iters 0"))
        self.first = train(folder / "first", 1, *first)
        """Trained a little, so that loaded weights differ from initial ones."""

    def plans(self, case: Case) -> dict[int, list[Plan]]:
        """By replica, the plans that a run under ``--dip-schedule`` followed, one per iteration."""
        self.of(case)
        found: dict[int, list[Plan]] = {}
        for path in sorted(self._of(case).glob("trace/plan-*.json")):
            replica = int(path.name.removeprefix("plan-replica").split("-")[0])
            found.setdefault(replica, []).append(load_plan(path))
        return found

    def _of(self, case: Case) -> Path:
        number = self._numbers.setdefault(case, len(self._numbers))
        schedule = "dip" if case.cut else "stock"
        return self._folder / f"{number:02d}-{case.layout.name}-{schedule}"

    def _make(self, case: Case) -> TrainingRun:
        folder = self._of(case)
        num_ranks = case.layout.num_pipeline_ranks
        cut = case.cut or Cut(num_segments=1)
        config = cut.config(folder.with_suffix(".yaml"), self._data, num_ranks)
        schedule = f"--dip-schedule --dip-trace-dir {folder / 'trace'}" if case.cut else ""
        if case.resumes is None:
            load = f"--load {self._weights} --finetune --no-load-optim --no-load-rng"
        else:
            load = f"--load {self._of(case.resumes) / 'saved'} --ckpt-step {NUM_ITERATIONS // 2}"
            assert self.of(case.resumes)
        text = (
            f"--train-iters {NUM_ITERATIONS} --eval-iters 2 --exit-on-missing-checkpoint {load} "
            f"{case.layout.arguments} {case.arguments} {case.own_arguments} {schedule}"
        )
        if case.saves:
            text += f" --save {folder / 'saved'} --save-interval {NUM_ITERATIONS // 2}"
        return train(
            folder, case.layout.num_processes, "--dip-config", str(config), *_arguments(text)
        )


def _arguments(text: str) -> tuple[str, ...]:
    sizes = f"--micro-batch-size {MICRO_BATCH_SIZE} --global-batch-size {4 * MICRO_BATCH_SIZE}"
    return tuple(shlex.split(f"{sizes} {text}"))


def largest_difference(ours: tuple[float, ...], expected: tuple[float, ...]) -> float:
    """Relative to ``expected``; infinite where the numbers of values differ or one is no number."""
    if len(ours) != len(expected) or not expected:
        return float("inf")
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True)]
    return max(d if d == d else float("inf") for d in differences)


def rounding(run: TrainingRun, exact: TrainingRun) -> dict[str, float]:
    """How far a run in 16 bits is from the same in 32: root mean squares of relative differences.

    ``gradients`` is over the parameters, in the last iteration; the others are over iterations.
    """
    pairs = {
        name: list(zip(getattr(run, name), getattr(exact, name), strict=True))
        for name in ("losses", "grad_norms", "validation_losses")
    }
    found = {name: _root_mean_square((a - b) / b for a, b in pairs[name]) for name in pairs}
    assert run.gradients.keys() == exact.gradients.keys()
    found["gradients"] = _root_mean_square(
        (run.gradients[name][1] - weighted_sum) / norm
        for name, (norm, weighted_sum) in exact.gradients.items()
        if norm
    )
    return found


def _root_mean_square(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))
