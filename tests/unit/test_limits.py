"""Numbers of forms: all of them have a range, and inside it nothing wraps or overflows."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import chain_case, make_item, make_problem
from pydantic import TypeAdapter

from megatron_dip.costs import Profile
from megatron_dip.costs.machine import ClusterConfig
from megatron_dip.costs.mixtures import Workload, built_in_mixture, draw_microbatches
from megatron_dip.costs.shapes import ModelShape
from megatron_dip.costs.work import static_bytes, work_costs
from megatron_dip.errors import ConfigError, PlanError, ProblemError
from megatron_dip.families.configs import FAMILIES
from megatron_dip.partition import Partition, partition_from_layers
from megatron_dip.plan import PipelineGraph
from megatron_dip.plan.actions import Action
from megatron_dip.plan.plan import _PlanForm
from megatron_dip.planner import form_sub_microbatches, make_plan
from megatron_dip.planner.evaluator import Budget
from megatron_dip.planner.search import check_workers
from megatron_dip.report import StepRecord
from megatron_dip.simulator import simulate
from megatron_dip.workload import Problem, parse_problem

FORMS = {
    "problem": Problem,
    "partition": Partition,
    "plan": _PlanForm,
    "profile": Profile,
    "model": ModelShape,
    "cluster": ClusterConfig,
    "statistics": Workload,
    "record": StepRecord,
    **FAMILIES,
}


def unbounded(schema: Any, path: str) -> list[str]:
    """Paths of all numbers in a JSON schema that lack a least or a most value."""
    if isinstance(schema, list):
        return [found for entry in schema for found in unbounded(entry, path)]
    if not isinstance(schema, dict):
        return []
    found = []
    if schema.get("type") in ("integer", "number") and not {"const", "enum"} & set(schema):
        least = {"minimum", "exclusiveMinimum"} & set(schema)
        most = {"maximum", "exclusiveMaximum"} & set(schema)
        found = [] if least and most else [path]
    for key, value in schema.items():
        found += unbounded(value, f"{path}.{key}")
    return found


@pytest.mark.parametrize("name", FORMS)
def test_every_number_of_a_form_has_a_range(name):
    assert unbounded(TypeAdapter(FORMS[name]).json_schema(), name) == []


WHOLE = st.one_of(
    st.integers(0, 1000),
    st.sampled_from(
        [2**31, 2**40, 2**50, 2**50 + 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]
    ),
    st.integers(-(2**70), 2**70),
)
REAL = st.one_of(
    st.floats(0.0, 1e6),
    st.sampled_from([0.0, 5e-324, 1e-300, 1e15, 1e18, 1e19, 1e300, 1.7e308, math.inf, math.nan]),
    st.floats(allow_nan=True, allow_infinity=True),
)


@st.composite
def extreme_problems(draw: st.DrawFn) -> dict[str, Any]:
    """A problem of one module in which some numbers are extreme."""
    data = chain_case(2, 2)[0].model_dump(mode="json")
    data["modules"][0]["num_layers"] = draw(st.sampled_from([2, 4, 10_000, 2**31, 10**9]))
    places = [
        (data, "num_ranks", WHOLE),
        (data["transfer"], "latency_us", REAL),
        (data["transfer"], "bytes_per_us", REAL),
        (data["modules"][0], "layer_overhead_us", REAL),
        (data["modules"][0], "layer_static_bytes", WHOLE),
        (data["modules"][0]["last_layer_extra"], "static_bytes", WHOLE),
        *((data["memory_limit_bytes"], rank, WHOLE) for rank in range(2)),
    ]
    for microbatch in data["microbatches"]:
        (item,) = microbatch["language"]
        places += [
            (item, name, REAL if name.endswith("_us") else WHOLE)
            for name in item
            if name not in ("needs", "item", "recompute_us")
        ]
    for place in draw(st.lists(st.sampled_from(range(len(places))), min_size=0, max_size=4)):
        container, key, values = places[place]
        container[key] = draw(values)
    return data


@settings(max_examples=100, deadline=None)
@given(extreme_problems())
def test_extreme_numbers_are_refused_by_name_or_added_up_exactly(data):
    try:
        problem = parse_problem(data)
    except ProblemError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
        return
    module = problem.module("language")
    layers = module.num_layers
    partition = partition_from_layers({"language": [[layers - 1, 1]]}, 2)
    graph = PipelineGraph(problem, partition, form_sub_microbatches(problem, {}))
    costs = work_costs(graph)
    items = [problem.items("language", number)[0] for number in range(2)]
    for place, count in ((0, layers - 1), (1, 1)):
        for number, item in enumerate(items):
            work = int(graph.wiring.first_work[place, number])
            extra = item.first_extra_activation_bytes if place == 0 else 0
            extra += item.last_extra_activation_bytes if place == 1 else 0
            assert int(costs.stored_bytes[work]) == count * item.activation_bytes + extra
            extra_us = item.first_extra_forward_us if place == 0 else item.last_extra_forward_us
            expected_us = count * (module.layer_overhead_us + Fraction(item.forward_us))
            assert costs.forward_us[work] == pytest.approx(float(expected_us + Fraction(extra_us)))
    for rank, count in ((0, layers - 1), (1, 1)):
        extra = module.last_layer_extra.static_bytes if rank == 1 else 0
        assert static_bytes(problem, partition, rank) == count * module.layer_static_bytes + extra
    plan = make_plan(problem, partition, algorithm="one_f_one_b")
    found = simulate(plan)
    assert math.isfinite(found.makespan_us)
    assert all(0 <= peak < 2**63 for peak in found.peak_bytes)
    held = [
        static_bytes(problem, partition, rank)
        + max(int(costs.stored_bytes[graph.wiring.first_work[rank, n]]) for n in range(2))
        for rank in range(2)
    ]
    assert all(peak >= least for peak, least in zip(found.peak_bytes, held, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_bytes", 2**62),
        ("boundary_bytes", 2**63),
        ("forward_us", 1e300),
        ("tokens", 1e308),
    ],
)
def test_an_item_that_no_machine_holds_is_refused_by_its_field(field, value):
    with pytest.raises(ProblemError, match=rf"microbatches\.0\.language\.0\.{field}: "):
        make_problem(
            (("language", (), True),),
            {"language": 4},
            [{"language": [make_item() | {field: value}]}],
            num_ranks=2,
        )


def test_bytes_that_only_together_are_too_many_are_refused():
    microbatch = {"language": [make_item(number, activation_bytes=2**49) for number in range(9)]}
    with pytest.raises(ProblemError, match=r"module language: .* 5\.07e\+19 bytes in 10000 layers"):
        make_problem((("language", (), True),), {"language": 10_000}, [microbatch], num_ranks=2)


def test_a_batch_of_too_many_works_is_refused_before_memory_is_taken():
    problem, _ = chain_case(1, 3)
    many = problem.model_copy(update={"microbatches": problem.microbatches * 2_000})
    stages = 2_000
    module = many.modules[0].model_copy(update={"num_layers": stages})
    many = many.model_copy(update={"modules": (module,)})
    partition = partition_from_layers({"language": [[1]] * stages}, 1)
    with pytest.raises(PlanError, match="6,000 sub-microbatches pass 12,000,000 stages"):
        PipelineGraph(many, partition, form_sub_microbatches(many, {}))


@pytest.mark.parametrize(
    ("count", "message"),
    [(10**9, "1000000000 microbatches"), (65_536, "hold more than 10,000,000 items")],
)
def test_batches_without_end_are_refused(count, message, monkeypatch):
    monkeypatch.setattr(
        "megatron_dip.costs.mixtures.MOST_ITEMS", 10_000_000 if count > 10**8 else 1000
    )
    with pytest.raises(ConfigError, match=message.replace("10,000,000", "1,000")):
        draw_microbatches(built_in_mixture("vlm"), count, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_tokens": 10**12},
        {"sequence_tokens": 10**8, "text_tokens": {"values": [1]}},
        {"images_per_sample": {"values": [10**9]}},
        {"image_patches": {"values": [4 * 10**12]}},
        {"text_tokens": {"values": [5], "weights": [1e308]}},
    ],
)
def test_statistics_without_end_are_refused(change):
    data = built_in_mixture("vlm").model_dump(mode="json") | change
    with pytest.raises(ValueError):
        TypeAdapter(Workload).validate_python(data)


def test_a_share_of_images_next_to_nothing_is_drawn():
    data = built_in_mixture("vlm").model_dump(mode="json") | {"image_share": {"values": [5e-324]}}
    workload = TypeAdapter(Workload).validate_python(data)
    (sizes,) = draw_microbatches(workload, 1, 0)
    assert sum(sizes["language"][0].spans) == sizes["language"][0].tokens


@pytest.mark.parametrize(
    "budget",
    [Budget(10**9), Budget(None, 1e300), Budget(None, math.nan), Budget(-1), Budget(None, 0)],
)
def test_a_search_without_end_is_refused(budget):
    with pytest.raises(ConfigError, match="search budget"):
        budget.check()


def test_a_million_workers_are_refused():
    with pytest.raises(ConfigError, match=r"1000000 workers \(expected at most 1,024\)"):
        check_workers(10**6)


def test_an_action_of_thousands_of_digits_is_none():
    with pytest.raises(PlanError, match="not a pipeline action"):
        Action.parse("0F" + "1" * 5000)


@pytest.mark.parametrize("search", ["local", "mcts"])
@pytest.mark.parametrize("microbatches", [[{}], [{"language": []}], [{}, {}]])
def test_a_batch_of_empty_microbatches_has_an_empty_plan(microbatches, search):
    problem, partition = chain_case(2, 1)
    empty = parse_problem(problem.model_dump(mode="json") | {"microbatches": microbatches})
    plan = make_plan(empty, partition, evaluations=1, search=search)
    assert {str(action) for line in plan.actions for action in line} == {
        "0REDUCE_GRAD",
        "1REDUCE_GRAD",
    }
    assert simulate(plan).makespan_us == 0.0


def test_sums_of_kernels_are_those_of_whole_numbers():
    """The largest that a form lets through, next to the limit of 64 bits."""
    problem = make_problem(
        (("language", (), True),),
        {"language": 2},
        [{"language": [make_item(activation_bytes=2**50, boundary_bytes=0)]}] * 2047,
        num_ranks=2,
    )
    partition = partition_from_layers({"language": [[1, 1]]}, 2)
    graph = PipelineGraph(problem, partition, form_sub_microbatches(problem, {}))
    total = int(np.sum(work_costs(graph).stored_bytes))
    assert total == 2 * 2047 * 2**50
