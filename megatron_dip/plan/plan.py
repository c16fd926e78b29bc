"""The plan: everything the ranks need for one batch, in memory, as JSON and as text.

A plan file is self-contained: it embeds its problem and partition, so that it can be validated,
simulated, drawn and rehearsed alone.  What travels to the ranks during training is the compact
form of :mod:`megatron_dip.planner.wire`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field

from megatron_dip.errors import PlanDigestError, PlanError
from megatron_dip.forms import Form
from megatron_dip.limits import Count, Layer
from megatron_dip.partition import Partition
from megatron_dip.plan.actions import Action, format_actions, parse_actions
from megatron_dip.plan.graph import PipelineGraph, Work
from megatron_dip.plan.queues import QueueModel
from megatron_dip.reading import read_json
from megatron_dip.workload import Problem, SubMicrobatch

__all__ = [
    "Estimate",
    "Offload",
    "Plan",
    "Recompute",
    "load_plan",
    "parse_plan",
    "plan_path",
    "plan_text",
    "save_plan",
]


class Recompute(NamedTuple):
    """Layers of one work whose activations are computed again in its backward."""

    stage: int
    microbatch: int
    sub: int
    layers: tuple[int, ...]
    """Layer numbers within the module."""


class Offload(NamedTuple):
    """Layers of one work whose activations are in the memory of the host for a while."""

    stage: int
    microbatch: int
    sub: int
    layers: tuple[int, ...]
    """Layer numbers within the module."""


Estimated = Annotated[float, Field(ge=0, le=1e290)]


class Estimate(Form):
    """What the simulator expects of a plan."""

    makespan_us: Estimated
    peak_bytes: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...]
    """Per rank, weights included."""
    bubble_fraction: tuple[Annotated[float, Field(ge=-1, le=1)], ...]
    """Per rank: idle time over makespan."""
    lower_bound_us: Estimated
    """No schedule of this partition and these sub-microbatches can be faster, with whole backwards
    where the plan has no split ones."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The schedule of one batch; every rank's list is complete, nothing is implied."""

    problem: Problem
    partition: Partition
    sub_microbatches: tuple[SubMicrobatch, ...]
    actions: tuple[tuple[Action, ...], ...]
    """Per rank, in order: computing, transfers and copies."""
    recompute: tuple[Recompute, ...] = ()
    offload: tuple[Offload, ...] = ()
    estimate: Estimate | None = None
    queues: QueueModel | None = None
    """What receives are placed for, and time is reckoned by; None where every stream has a hardware
    queue of its own."""

    @classmethod
    def of_graph(
        cls,
        graph: PipelineGraph,
        actions: tuple[tuple[Action, ...], ...],
        *,
        recompute: tuple[Recompute, ...] = (),
        offload: tuple[Offload, ...] = (),
        estimate: Estimate | None = None,
        queues: QueueModel | None = None,
    ) -> Self:
        """A schedule of the batch whose ``graph`` is at hand, so that it is not made again."""
        plan = cls(
            problem=graph.problem,
            partition=graph.partition,
            sub_microbatches=graph.sub_microbatches,
            actions=actions,
            recompute=recompute,
            offload=offload,
            estimate=estimate,
            queues=queues,
        )
        vars(plan)["graph"] = graph
        return plan

    @cached_property
    def graph(self) -> PipelineGraph:
        return PipelineGraph(self.problem, self.partition, self.sub_microbatches)

    @cached_property
    def recomputed_layers(self) -> dict[Work, tuple[int, ...]]:
        return {Work(r.stage, r.microbatch, r.sub): r.layers for r in self.recompute}

    @cached_property
    def offloaded_layers(self) -> dict[Work, tuple[int, ...]]:
        return {Work(o.stage, o.microbatch, o.sub): o.layers for o in self.offload}

    def to_text(self) -> str:
        """One line per rank."""
        return "\n".join(format_actions(actions) for actions in self.actions)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object; see ``docs/plan_format.md``."""
        return {
            "format": "megatron-dip/plan",
            "version": 1,
            "problem_digest": self.problem.digest(),
            "partition_digest": self.partition.digest(),
            "sub_microbatches": [
                {
                    "module": s.module,
                    "microbatch": s.microbatch,
                    "sub": s.sub,
                    "items": list(s.items),
                }
                for s in self.sub_microbatches
            ],
            "ranks": [{"actions": [str(a) for a in actions]} for actions in self.actions],
            "recompute": [_layers_json(one) for one in self.recompute],
            **({"offload": [_layers_json(one) for one in self.offload]} if self.offload else {}),
            "estimate": None if self.estimate is None else self.estimate.model_dump(mode="json"),
            **({} if self.queues is None else {"queues": self.queues.model_dump(mode="json")}),
            "partition": self.partition.model_dump(mode="json"),
            "problem": self.problem.model_dump(mode="json"),
        }


def _layers_json(one: Recompute | Offload) -> dict[str, Any]:
    return one._asdict() | {"layers": list(one.layers)}


class _SubMicrobatchForm(Form):
    module: str
    microbatch: Count
    sub: Count
    items: tuple[Count, ...]


class _RankForm(Form):
    actions: tuple[str, ...]


class _LayersForm(Form):
    stage: Count
    microbatch: Count
    sub: Count
    layers: tuple[Layer, ...]


class _PlanForm(Form):
    format: Literal["megatron-dip/plan"]
    version: Literal[1]
    problem_digest: str
    partition_digest: str
    sub_microbatches: tuple[_SubMicrobatchForm, ...]
    ranks: tuple[_RankForm, ...]
    recompute: tuple[_LayersForm, ...] = ()
    offload: tuple[_LayersForm, ...] = ()
    estimate: Estimate | None = None
    queues: QueueModel | None = None
    partition: Partition
    problem: Problem


def parse_plan(data: Mapping[str, Any], source: str = "") -> Plan:
    """A plan from parsed JSON; it is well formed, not yet validated.

    Raises:
        PlanError: A field is missing or unknown, or an action is none.
        PlanDigestError: The embedded problem or partition is not the one the plan was made for.
    """
    form = _PlanForm.parse(data, PlanError, source)
    for name, embedded, stated in (
        ("problem", form.problem, form.problem_digest),
        ("partition", form.partition, form.partition_digest),
    ):
        if embedded.digest() != stated:
            raise PlanDigestError(
                f"{source or 'plan'}: {name}_digest is {stated[:16]}... but the embedded "
                f"{name} has {embedded.digest()[:16]}... (the {name} was changed after planning: "
                f"plan again)"
            )
    return Plan(
        problem=form.problem,
        partition=form.partition,
        sub_microbatches=tuple(
            SubMicrobatch(s.module, s.microbatch, s.sub, s.items) for s in form.sub_microbatches
        ),
        actions=_parse_ranks(form.ranks, source),
        recompute=tuple(Recompute(r.stage, r.microbatch, r.sub, r.layers) for r in form.recompute),
        offload=tuple(Offload(o.stage, o.microbatch, o.sub, o.layers) for o in form.offload),
        estimate=form.estimate,
        queues=form.queues,
    )


def _parse_ranks(ranks: tuple[_RankForm, ...], source: str) -> tuple[tuple[Action, ...], ...]:
    try:
        return tuple(parse_actions(" ".join(rank.actions)) for rank in ranks)
    except PlanError as error:
        raise PlanError(f"{source or 'plan'}: {error}") from None


def load_plan(path: str | Path) -> Plan:
    """The plan in a JSON file; see :func:`parse_plan`."""
    return parse_plan(read_json(path, PlanError), str(path))


def plan_path(folder: str | Path, replica: int, iteration: int) -> Path:
    """The file in a trace folder of the plan that an iteration of a replica ran."""
    return Path(folder) / f"plan-replica{replica}-{iteration:06d}.json"


def plan_text(plan: Plan) -> str:
    """What a file of ``plan`` holds."""
    return json.dumps(plan.to_json(), indent=1) + "\n"


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write ``plan`` as JSON."""
    Path(path).write_text(plan_text(plan), encoding="utf-8")
