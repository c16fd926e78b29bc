"""The registry of baselines, those on a plan's own stages, and the filling of gaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import (
    MODULE_GRAPHS,
    cases,
    chain_case,
    encoder_case,
    make_graph,
    make_item,
    make_problem,
)

from megatron_dip.errors import ConfigError, InfeasibleError, ProblemError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import format_actions
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import form_sub_microbatches, make_plan
from megatron_dip.planner.baselines import BaselineCase, StaticCuts, baselines, find_baseline
from megatron_dip.planner.baselines.on_stages import (
    order_as_given,
    order_encoder_in_bubbles,
    order_nested_encoder,
    order_optimus_coarse,
)
from megatron_dip.simulator import build_task_table, simulate_order, useful_work_us
from megatron_dip.simulator.simulate import decode_order
from megatron_dip.workload import Problem

ON_STAGES = (
    order_encoder_in_bubbles,
    order_nested_encoder,
    order_optimus_coarse,
    order_as_given,
)


def case_of(problem, partition, max_tokens: int | None = 1, **fields) -> BaselineCase:
    limits = {module.name: max_tokens for module in problem.modules}
    return BaselineCase(
        problem=problem,
        partition=partition,
        sub_microbatches=form_sub_microbatches(problem, limits),
        cuts=StaticCuts([problem]),
        **fields,
    )


def large_case(**fields) -> BaselineCase:
    """Three ranks, two backbone segments, eight microbatches of every kind."""
    problem = make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 6, "language": 12},
        [
            {
                "vision": [make_item(image, 1.5) for image in range(number % 3)],
                "language": [make_item(0, 1.0 + number % 2)],
            }
            for number in range(8)
        ],
        num_ranks=3,
        **fields,
    )
    layers = {"vision": [[2, 2, 2]], "language": [[2, 2, 2], [2, 2, 2]]}
    return case_of(problem, partition_from_layers(layers, 3), evaluations=20)


@pytest.mark.parametrize("name", [baseline.name for baseline in baselines()])
def test_every_baseline_runs_and_its_result_agrees_with_its_picture(name):
    case = large_case()
    known = find_baseline(name)
    result = known.run(case)
    panel = result.panel("drawn")
    assert panel.end_us == pytest.approx(result.makespan_us)
    assert panel.num_ranks == 3
    assert tuple(max(held for _, held in panel.memory[rank]) for rank in range(3)) == (
        result.peak_bytes
    )
    assert 0.0 < result.utilisation <= 1.0
    # Without overheads all computing is useful, but for what is recomputed, and this case fits.
    busy = sum(1.0 - idle for idle in result.idle) / 3
    assert busy == pytest.approx(result.utilisation)
    assert result.keeps_memory_limit
    assert (result.plan is not None) == known.runs_on_stages
    if result.plan is not None:
        validate_plan(result.plan)
        assert result.plan.problem == case.problem


def test_results_say_what_was_chosen():
    case = large_case(memory_limit_bytes=[220, 220, 220])
    free, limited = (find_baseline(name).run(case) for name in ("1f1b", "1f1b-recompute"))
    assert not free.keeps_memory_limit
    assert limited.keeps_memory_limit
    assert limited.makespan_us > free.makespan_us
    assert limited.detail == "3 layers per piece recomputed"
    assert "pieces per rank" in find_baseline("interleaved").run(case).detail


def test_bad_input_names_the_baseline_and_what_is_wrong():
    with pytest.raises(ConfigError, match=r"no baseline '1f1bb' .*1f1b, 1f1b-recompute"):
        find_baseline("1f1bb")
    with pytest.raises(InfeasibleError, match=r"^baseline 1f1b-recompute: rank \d: .*limit"):
        find_baseline("1f1b-recompute").run(large_case(memory_limit_bytes=[9, 9, 9]))
    problem, partition = encoder_case()
    other = chain_case(2, 2)[0]
    with pytest.raises(ProblemError, match=r"language \(2 layers\) on 2 ranks"):
        BaselineCase(
            problem=problem, partition=partition, sub_microbatches=(), cuts=StaticCuts([other])
        )


@given(case=cases(), order=st.sampled_from(ON_STAGES), max_tokens=st.sampled_from([None, 1]))
@settings(max_examples=60)
def test_every_order_on_stages_is_a_complete_schedule_of_any_batch(case, order, max_tokens):
    problem, partition = case
    table = build_task_table(make_graph(problem, partition, max_tokens))
    is_interleaved = max(stage.segment for stage in partition.chains[problem.module_order[-1]])
    if is_interleaved and problem.num_microbatches < problem.num_ranks and order != order_as_given:
        with pytest.raises(InfeasibleError, match="at least as many microbatches as ranks"):
            order(table)
        return
    made = order(table)
    assert np.array_equal(np.sort(made.task), np.flatnonzero(table.whole.exists))
    assert simulate_order(table, made).makespan_us * problem.num_ranks >= useful_work_us(problem)


@pytest.mark.parametrize("order", [order_encoder_in_bubbles, order_nested_encoder])
def test_the_backbone_alone_runs_in_megatrons_order(order):
    problem, partition = chain_case(3, 4)
    table = build_task_table(make_graph(problem, partition))
    assert [format_actions(line) for line in decode_order(table, order(table))] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def image_problem(num_microbatches: int) -> Problem:
    return make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 2, "language": 2},
        [
            {"vision": [make_item(0, activation_bytes=100)], "language": [make_item(0, 1.0)]}
            for _ in range(num_microbatches)
        ],
        num_ranks=2,
    )


def test_encoder_in_bubbles_runs_ahead_and_nested_encoder_holds_as_much_for_any_batch():
    def peak(order, num_microbatches: int) -> int:
        partition = partition_from_layers({"vision": [[1, 1]], "language": [[1, 1]]}, 2)
        table = build_task_table(make_graph(image_problem(num_microbatches), partition))
        return max(simulate_order(table, order(table)).peak_bytes)

    # Rank 0 holds two microbatches in the backbone (20 bytes) and three in the encoder.
    assert peak(order_nested_encoder, 8) == peak(order_nested_encoder, 32) == 320
    assert peak(order_encoder_in_bubbles, 32) > peak(order_encoder_in_bubbles, 8) > 320


def test_the_coarse_variant_uses_the_bubbles_at_both_ends_alone():
    case = large_case()
    order = order_optimus_coarse(case.table)
    is_backbone = np.isin(
        case.table.stage, [stage.stage for stage in case.partition.chains["language"]]
    )
    for rank in range(3):
        tasks = order.task[order.first[rank] : order.first[rank + 1]]
        is_forward = tasks < case.table.num_works
        backbone = is_backbone[tasks % case.table.num_works]
        first_backward = np.flatnonzero(backbone & ~is_forward)[0]
        last_forward = np.flatnonzero(backbone & is_forward)[-1]
        assert np.flatnonzero(~backbone & is_forward)[-1] < first_backward
        assert np.flatnonzero(~backbone & ~is_forward)[0] > last_forward


def test_microbatches_go_as_given_without_reordering():
    partition = partition_from_layers({"vision": [[1, 1]], "language": [[1, 1]]}, 2)
    table = build_task_table(make_graph(image_problem(3), partition))
    assert [format_actions(line) for line in decode_order(table, order_as_given(table))] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 2B1 2F2 0B0 2B2 0B1 0B2",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 3F2 3B2 1B1 1B2",
    ]
    case = large_case()
    usual = make_plan(case.problem, case.partition, max_tokens={"vision": 1, "language": 1})
    for actions, is_as_given in (
        (decode_order(case.table, order_as_given(case.table))[0], True),
        (usual.actions[0], False),
    ):
        forwards = [a.microbatch for a in actions if a.stage == 0 and a.type.value == "F"]
        assert (forwards == sorted(forwards)) == is_as_given


def test_without_sub_microbatches_nothing_is_split():
    case = large_case()
    result = find_baseline("without-sub-microbatches").run(case)
    assert max(group.sub for group in case.sub_microbatches) > 0
    assert max(group.sub for group in result.plan.sub_microbatches) == 0
