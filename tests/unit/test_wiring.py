"""The arrays of a batch against the rules that they stand for, and actions as numbers."""

import dataclasses
import gc

import numpy as np
import pytest
from hypothesis import given, settings
from planning_cases import cases, chain_case, elements, encoder_case, items_of, make_graph

from megatron_dip.errors import PlanError
from megatron_dip.plan import Action, ActionType, Message, PipelineGraph, Plan, Work
from megatron_dip.plan.collector import without_collection
from megatron_dip.plan.numbers import TYPE_NUMBERS, number_actions
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner import make_plan
from megatron_dip.workload import SubMicrobatch


def inputs_by_the_rules(graph: PipelineGraph, work: Work) -> list[Message]:
    """What a forward waits for: the stage before, or the upstream items that it needs."""
    stage = graph.partition[work.stage]
    chain = graph.partition.chains[stage.module]
    place = chain.index(stage)
    if place:
        return [Message(chain[place - 1].stage, work.stage, work.microbatch, work.sub, False)]
    found = []
    for upstream in graph.problem.module(stage.module).upstream:
        needed = [
            graph.problem.needed_items(stage.module, work.microbatch, item, upstream)
            for item in items_of(graph, work)
        ]
        last = graph.partition.chains[upstream][-1].stage
        found += [
            Message(last, work.stage, work.microbatch, group.sub, False)
            for group in graph.subs(upstream, work.microbatch)
            if any(numbers.intersection(group.items) for numbers in needed)
        ]
    return found


@given(case=cases())
@settings(max_examples=60)
def test_the_arrays_say_what_the_rules_say(case):
    graph = make_graph(*case)
    expected = {work: inputs_by_the_rules(graph, work) for work in graph.works}
    made: dict[Message, list[Work]] = {}
    for work, messages in expected.items():
        assert list(graph.forward_inputs(work)) == messages
        for message in messages:
            made.setdefault(message, []).append(work)
    outputs = [message for work in graph.works for message in graph.forward_outputs(work)]
    assert sorted(outputs) == sorted(made)
    wiring = graph.wiring
    for number, message in enumerate(outputs):
        assert list(graph.readers(message)) == made[message]
        assert wiring.crosses[number] == graph.crosses_ranks(message)
        assert wiring.has_gradient[number] == graph.has_backward(message.source)


@given(case=cases())
@settings(max_examples=60)
def test_a_stage_takes_the_part_in_backwards_that_its_layers_do(case):
    problem, partition = case
    graph = make_graph(*case)
    for number, found in elements(problem, partition).items():
        share = graph.backwards[number]
        with_backward = [e.layer for e in found if e.has_backward and e.layer is not None]
        assert list(share.layers) == with_backward
        assert share.has_backward == any(element.has_backward for element in found)
        assert share.has_weight_grad == any(element.is_trained for element in found)
        assert not share.has_weight_grad or share.has_backward


@given(case=cases())
@settings(max_examples=30)
def test_every_action_of_a_plan_is_found_by_its_number(case):
    plan = make_plan(*case)
    numbers = number_actions(plan.graph, plan.actions)
    wiring = plan.graph.wiring
    messages = [m for work in plan.graph.works for m in plan.graph.forward_outputs(work)]
    for action, number in zip(numbers.actions, numbers.number.tolist(), strict=True):
        if action.type is ActionType.REDUCE_GRAD:
            assert wiring.place_stage[number] == action.stage
        elif action.type.is_compute:
            assert plan.graph.works[number].action(action.type) == action
        else:
            message = Message.of(action)
            assert messages[number] == (message.reverse if message.is_gradient else message)


@pytest.mark.parametrize(
    "action",
    [
        Action(9, ActionType.FORWARD, 0),
        Action(0, ActionType.FORWARD, 9),
        Action(0, ActionType.FORWARD, 0, 9),
        Action(0, ActionType.FORWARD, -1),
        Action(0, ActionType.FORWARD),
        Action(0, ActionType.FORWARD, 0, 0, 1),
        Action(0, ActionType.SEND_FORWARD, 0),
        Action(0, ActionType.SEND_FORWARD, 0, 0, 0),
        Action(0, ActionType.SEND_FORWARD, 0, 0, 9),
        Action(0, ActionType.SEND_BACKWARD, 0, 0, 1),
        Action(0, ActionType.REDUCE_GRAD, 0),
    ],
)
def test_an_action_that_the_batch_lacks_has_no_number(action):
    graph = make_graph(*chain_case(2, 2))
    good = Action(0, ActionType.SEND_FORWARD, 1, 0, 1)
    numbers = number_actions(graph, [[action], [good]])
    assert numbers.number.tolist() == [-1, 1]
    assert numbers.type.tolist() == [TYPE_NUMBERS[action.type], TYPE_NUMBERS[good.type]]
    assert numbers.rank.tolist() == [0, 1]


def test_a_reduction_of_one_microbatch_is_refused():
    plan = make_plan(*chain_case(1, 1))
    actions = ((*plan.actions[0], Action(0, ActionType.REDUCE_GRAD, 0)),)
    with pytest.raises(PlanError, match="0REDUCE_GRAD0 stands for a whole stage"):
        validate_plan(dataclasses.replace(plan, actions=actions))


def test_a_plan_with_other_sub_microbatches_has_another_graph():
    plan = make_plan(*encoder_case(), max_tokens={"vision": 1})
    assert Plan.of_graph(plan.graph, plan.actions).graph is plan.graph
    whole = (SubMicrobatch("vision", 0, 0, (0, 1)), *plan.sub_microbatches[2:])
    with pytest.raises(PlanError, match=r"0F0\.1 is not part of the batch"):
        validate_plan(dataclasses.replace(plan, sub_microbatches=whole))


def test_works_are_numbered_upstream_first():
    graph = make_graph(*encoder_case())
    assert np.all(graph.wiring.reader_source < graph.wiring.reader)


def test_the_garbage_collector_comes_back_only_where_it_was():
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collection(), without_collection():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
