"""Lowering: text goldens, and where transfers and gradient reductions go."""

from pathlib import Path

import numpy as np
import pytest
from planning_cases import chain_case, encoder_case, make_graph

from megatron_dip.errors import PlanError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import parse_actions
from megatron_dip.plan.lowering import canonical_reduce_order, lower
from megatron_dip.planner import make_plan, plan_from_order

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.parametrize(
    ("name", "case", "options"),
    [
        ("chain_1f1b", chain_case(3, 3), {"algorithm": "one_f_one_b"}),
        ("encoder_1f1b", encoder_case(), {"algorithm": "one_f_one_b"}),
        ("encoder_dual_queue", encoder_case(), {}),
        ("encoder_dual_queue_split", encoder_case(), {"split_backward": True}),
        ("frozen_encoder", encoder_case("frozen encoder"), {}),
        ("frozen_backbone", encoder_case("frozen backbone"), {}),
    ],
)
def test_plan_is_the_golden_one(name, case, options):
    problem, partition = case
    plan = make_plan(problem, partition, max_tokens={problem.modules[0].name: 1}, **options)
    assert plan.to_text() + "\n" == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_messages_within_a_rank_are_no_transfers():
    problem, _ = chain_case(1, 2)
    partition = partition_from_layers({"language": [[1]]}, 1)
    assert make_plan(problem, partition).to_text() == "0F0 0B0 0F1 0B1 0REDUCE_GRAD"


def test_a_receive_is_posted_before_the_action_that_runs_while_it_arrives():
    problem, partition = chain_case(2, 3)
    graph = make_graph(problem, partition)
    order = (
        parse_actions("0F0 0F1 0F2 0B0 0B1 0B2"),
        parse_actions("1F0 1B0 1F1 1B1 1F2 1B2"),
    )
    # Microbatch 2 leaves rank 0 while rank 1 is in the backward of microbatch 0.
    rank_1 = plan_from_order(graph, order).to_text().splitlines()[1]
    assert "1RECV_F2<0 1B0 1SEND_B0>0 1F1" in rank_1


def test_canonical_reduce_order_is_backbone_first_and_last_stage_first():
    problem, _ = encoder_case()
    partition = partition_from_layers({"vision": [[1, 1]], "language": [[1, 0], [1, 0]]}, 2)
    graph = make_graph(problem, partition)
    assert canonical_reduce_order(graph, 0) == (3, 2, 0)
    assert canonical_reduce_order(graph, 1) == (4, 1)


def test_a_trainable_stage_without_work_is_reduced_too():
    problem, partition = encoder_case()
    text_only = problem.model_copy(update={"microbatches": problem.microbatches[1:]})
    lines = make_plan(text_only, partition).to_text().splitlines()
    assert lines[0].endswith("2REDUCE_GRAD 0REDUCE_GRAD")
    assert lines[1].endswith("3REDUCE_GRAD 1REDUCE_GRAD")


def test_a_frozen_stage_is_not_reduced():
    assert "0REDUCE_GRAD" not in make_plan(*encoder_case("frozen encoder")).to_text()


def test_an_early_reduction_waits_for_its_turn_and_no_longer():
    problem, partition = encoder_case()
    graph = make_graph(problem, partition, max_tokens=None)
    order = (
        parse_actions("0F0 2F0 2F1 2B1 2B0 0B0"),
        parse_actions("1F0 3F0 3F1 3B1 3B0 1B0"),
    )
    rank_0 = plan_from_order(graph, order).to_text().splitlines()[0].split()
    assert rank_0.index("2REDUCE_GRAD") < rank_0.index("0B0") < rank_0.index("0REDUCE_GRAD")


def test_a_message_that_nobody_makes_is_refused():
    graph = make_graph(*chain_case(2, 1))
    # Forwards are tasks 0 and 1, backwards 2 and 3.
    assert lower(graph, np.array([0, 1, 3, 2]))
    with pytest.raises(PlanError, match="0SEND_F0>1 has nothing to send"):
        lower(graph, np.array([1, 3, 2]))
    with pytest.raises(PlanError, match="1SEND_B0>0 has nothing to send"):
        lower(graph, np.array([0, 1, 2]))
