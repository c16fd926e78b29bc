"""Baselines by name, each run on one batch with one kind of result.

To add one: write a function from a :class:`BaselineCase` to a :class:`BaselineResult` and name it
in :func:`baselines`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Self

from megatron_dip.errors import ConfigError, InfeasibleError, shown
from megatron_dip.partition import Partition
from megatron_dip.plan.graph import PipelineGraph
from megatron_dip.plan.plan import Plan
from megatron_dip.planner.baselines.cuts import StaticCuts
from megatron_dip.planner.baselines.flat_chain import FlatChain, StaticCut
from megatron_dip.planner.baselines.on_stages import (
    order_as_given,
    order_encoder_in_bubbles,
    order_nested_encoder,
    order_optimus_coarse,
)
from megatron_dip.planner.baselines.static import (
    StaticRun,
    StaticSimulator,
    run_with_own_recomputation,
    run_within_memory,
)
from megatron_dip.planner.baselines.zero_bubble import run_zero_bubble
from megatron_dip.planner.planner import make_plan, plan_from_order
from megatron_dip.simulator.arrays import TaskOrder
from megatron_dip.simulator.bounds import useful_work_us
from megatron_dip.simulator.simulate import decode_order, simulate
from megatron_dip.simulator.tasks import TaskTable, build_task_table
from megatron_dip.simulator.timeline import Panel, plan_panel
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = ["Baseline", "BaselineCase", "BaselineResult", "baselines", "find_baseline"]


@dataclass(frozen=True, kw_only=True)
class BaselineCase:
    """What baselines run on: a batch, the stages of a plan for it, and cuts for static ones.

    Raises:
        ProblemError: The cuts were fitted on problems of another model.
    """

    problem: Problem
    partition: Partition
    sub_microbatches: tuple[SubMicrobatch, ...]
    cuts: StaticCuts
    """Made once, they serve any number of cases."""
    evaluations: int | None = 200
    """How many schedules a baseline with a search may make; or"""
    budget_ms: float | None = None
    """how long it may search; with neither, it takes the default rule."""

    def __post_init__(self) -> None:
        self.cuts.check_fits(self.problem)

    @classmethod
    def of_plan(cls, plan: Plan, cuts: StaticCuts) -> Self:
        """The batch and the stages of ``plan``."""
        return cls(
            problem=plan.problem,
            partition=plan.partition,
            sub_microbatches=plan.sub_microbatches,
            cuts=cuts,
        )

    @cached_property
    def chain(self) -> FlatChain:
        return FlatChain(self.problem)

    @cached_property
    def table(self) -> TaskTable:
        return build_task_table(PipelineGraph(self.problem, self.partition, self.sub_microbatches))


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """One baseline on one batch."""

    problem: Problem
    detail: str
    """What was chosen for it, for people."""
    makespan_us: float
    peak_bytes: tuple[int, ...]
    """Per rank, weights included."""
    idle: tuple[float, ...]
    """Per rank, the part of the makespan in which it does not compute."""
    panel: Callable[[str], Panel]
    """Makes the timeline with a title."""
    plan: Plan | None = None
    """Where the baseline runs on the stages of the case."""

    @property
    def utilisation(self) -> float:
        """Useful work over ranks x makespan; zero for a batch that takes no time."""
        total_us = self.problem.num_ranks * self.makespan_us
        return useful_work_us(self.problem) / total_us if total_us else 0.0

    @property
    def keeps_memory_limit(self) -> bool:
        return self.problem.keeps_memory_limit(self.peak_bytes)


class Baseline(NamedTuple):
    """An entry of the registry."""

    name: str
    summary: str
    runs_on_stages: bool
    """False where the partition and the sub-microbatches of the case make no difference."""
    make: Callable[[BaselineCase], BaselineResult]

    def run(self, case: BaselineCase) -> BaselineResult:
        """Run on ``case``.

        Raises:
            InfeasibleError: The baseline cannot run this batch; the message says which and why.
        """
        try:
            return self.make(case)
        except InfeasibleError as error:
            raise InfeasibleError(f"baseline {self.name}: {error}") from error


def baselines() -> tuple[Baseline, ...]:
    """All baselines."""
    schedules = (
        ("1f1b", "Megatron's 1F1B, best cut", lambda cuts: cuts.one_f_one_b),
        ("interleaved", "Megatron's interleaved 1F1B, best cut", lambda cuts: cuts.interleaved),
        ("1f1b-stock", "Megatron's 1F1B, encoder on rank 0", lambda cuts: cuts.one_f_one_b_stock),
        (
            "interleaved-stock",
            "Megatron's interleaved 1F1B, encoder on rank 0",
            lambda cuts: cuts.interleaved_stock,
        ),
        (
            "megatron",
            "Megatron's interleaved 1F1B, chunks balanced by parameters",
            lambda cuts: cuts.megatron,
        ),
        (
            "megatron-4",
            "Megatron's interleaved 1F1B, 4 chunks per rank balanced by parameters",
            lambda cuts: cuts.megatron_in_four,
        ),
    )
    found = []
    for name, summary, cut_of in schedules:
        found.append(Baseline(name, summary, False, partial(_run_static, cut_of)))
        limited = f"{summary}, recomputing within the memory limit"
        run = partial(_run_static, cut_of, run=run_within_memory)
        found.append(Baseline(f"{name}-recompute", limited, False, run))
    orders = (
        ("nested-encoder", "encoder nested in Megatron's backbone", order_nested_encoder),
        ("encoder-in-bubbles", "encoder in Megatron's bubbles", order_encoder_in_bubbles),
        ("optimus-coarse", "encoder in the bubbles at both ends", order_optimus_coarse),
        ("without-reordering", "dual queue, microbatches as given", order_as_given),
    )
    return (
        *found,
        Baseline("nnscaler", "1F1B, best cut with recomputation per rank", False, _run_nnscaler),
        Baseline("zero-bubble", "ZB-H1 on the best cut of 1F1B", False, _run_zero_bubble),
        *(Baseline(name, text, True, partial(_run_order, order)) for name, text, order in orders),
        Baseline(
            "without-sub-microbatches",
            "searched, microbatches not split",
            True,
            _run_without_sub_microbatches,
        ),
    )


def find_baseline(name: str) -> Baseline:
    """The baseline ``name``.

    Raises:
        ConfigError: There is none of this name.
    """
    by_name = {baseline.name: baseline for baseline in baselines()}
    if name not in by_name:
        raise ConfigError(f"no baseline {shown(name)} (expected one of {', '.join(by_name)})")
    return by_name[name]


def _run_static(
    cut_of: Callable[[StaticCuts], StaticCut],
    case: BaselineCase,
    run: Callable[[StaticSimulator, StaticCut], StaticRun] = StaticSimulator.run,
) -> BaselineResult:
    found = run(StaticSimulator(case.chain), cut_of(case.cuts))
    details = []
    if found.cut.num_virtual > 1:
        details.append(f"{found.cut.num_virtual} pieces per rank")
    if found.num_recomputed:
        details.append(f"{found.num_recomputed} layers per piece recomputed")
    return _of_static(case, found, ", ".join(details))


def _run_nnscaler(case: BaselineCase) -> BaselineResult:
    found = run_with_own_recomputation(StaticSimulator(case.chain), case.cuts.nnscaler)
    assert isinstance(found.num_recomputed, tuple)
    numbers = " ".join(map(str, found.num_recomputed))
    return _of_static(case, found, f"{numbers} layers recomputed" * any(found.num_recomputed))


def _run_zero_bubble(case: BaselineCase) -> BaselineResult:
    return _of_static(case, run_zero_bubble(case.chain, case.cuts.one_f_one_b), "")


def _of_static(case: BaselineCase, run: StaticRun, detail: str) -> BaselineResult:
    return BaselineResult(
        problem=case.problem,
        detail=detail,
        makespan_us=run.makespan_us,
        peak_bytes=run.peak_bytes,
        idle=run.idle,
        panel=run.panel,
    )


def _run_order(order: Callable[[TaskTable], TaskOrder], case: BaselineCase) -> BaselineResult:
    actions = decode_order(case.table, order(case.table))
    return _of_plan(plan_from_order(case.table.graph, actions), "")


def _run_without_sub_microbatches(case: BaselineCase) -> BaselineResult:
    plan = make_plan(
        case.problem,
        case.partition,
        max_tokens={module.name: None for module in case.problem.modules},
        evaluations=case.evaluations,
        budget_ms=case.budget_ms,
    )
    return _of_plan(plan, "")


def _of_plan(plan: Plan, detail: str) -> BaselineResult:
    simulation = simulate(plan)
    return BaselineResult(
        problem=plan.problem,
        detail=detail,
        makespan_us=simulation.makespan_us,
        peak_bytes=simulation.peak_bytes,
        idle=simulation.bubble_fraction,
        panel=lambda title: plan_panel(plan, title, simulation),
        plan=plan,
    )
