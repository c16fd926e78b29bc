"""Problems, partitions and the dependency graph: what is refused, and who waits for whom."""

import json

import pytest
from planning_cases import (
    MODULE_GRAPHS,
    chain_case,
    encoder_case,
    make_graph,
    make_item,
    make_problem,
)

from megatron_dip.costs.work import work_costs
from megatron_dip.errors import PartitionError, PlanError, ProblemError
from megatron_dip.partition import cut_evenly, parse_partition, partition_from_layers
from megatron_dip.plan import Message, PipelineGraph, Work
from megatron_dip.planner import form_sub_microbatches
from megatron_dip.workload import SubMicrobatch, parse_problem


def problem_data() -> dict:
    return encoder_case()[0].model_dump(mode="json")


def first_item(data: dict) -> dict:
    return data["microbatches"][0]["language"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: first_item(d).pop("forward_us"), "language.0.forward_us: Field required"),
        (lambda d: first_item(d).update(forward_us=-1), "language.0.forward_us"),
        (lambda d: first_item(d).update(needs={"vision": [7]}), r"no such items \[7\]"),
        (lambda d: first_item(d).update(needs={"audio": [0]}), "'audio' is not upstream"),
        (lambda d: d["microbatches"][0].update(audio=[]), "unknown module"),
        (lambda d: d["modules"][0].update(upstream=["language"]), "cycle"),
        (lambda d: d["modules"][1].update(upstream=["video"]), "unknown modules"),
        (lambda d: d["modules"][1].update(name="vision"), "names repeat"),
        (lambda d: d["memory_limit_bytes"].pop(), "one per rank"),
        (lambda d: d.update(version=2), "version"),
        (lambda d: d["modules"][0].update(trained_layers=[[0, 3]]), r"trained_layers \[\[0, 3\]\]"),
        (lambda d: d["modules"][0].update(trained_layers=[[1, 2], [0, 1]]), "ascending pairs"),
        (
            lambda d: d["modules"][0].update(
                trainable=False, last_layer_extra={"trainable": True, "static_bytes": 0}
            ),
            "trainable is false but .* something is trained",
        ),
        (
            lambda d: d["modules"][0].update(
                trained_layers=[],
                first_layer_extra={"trainable": False},
                last_layer_extra={"trainable": False},
            ),
            "trainable is true but .* nothing is trained",
        ),
    ],
)
def test_a_wrong_problem_names_the_field(change, message):
    data = problem_data()
    assert parse_problem(data)
    change(data)
    with pytest.raises(ProblemError, match=message):
        parse_problem(data)


def test_what_parts_are_trained_is_written_only_where_it_is_said():
    data = problem_data()
    assert "trained_layers" not in json.dumps(data)
    assert "trainable" not in data["modules"][0]["last_layer_extra"]
    digest = parse_problem(data).digest()
    data["modules"][0] |= {"trained_layers": [[0, 2]], "frozen_layer_static_bytes": 3}
    said = parse_problem(data)
    assert said.digest() != digest
    assert parse_problem(json.loads(said.model_dump_json())) == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stages: stages[1].update(first_layer=0), "stage 1: first_layer is 0 .expected 1"),
        (lambda stages: stages[1].update(stage=0), "numbers repeat"),
        (lambda stages: stages[1].update(rank=0), "share a segment and rank"),
    ],
)
def test_a_wrong_partition_names_the_stage(change, message):
    data = encoder_case()[1].model_dump(mode="json")
    change(data["stages"])
    with pytest.raises(PartitionError, match=message):
        parse_partition(data)


def test_a_partition_names_sizes_of_sub_microbatches_for_its_own_modules_only():
    data = encoder_case()[1].model_dump(mode="json")
    assert "sub_microbatch_tokens" not in data
    sized = parse_partition(data | {"sub_microbatch_tokens": {"vision": 4096}})
    assert sized.digest() != parse_partition(data).digest()
    with pytest.raises(PartitionError, match=r"modules \['audio'\] have no stages"):
        parse_partition(data | {"sub_microbatch_tokens": {"audio": 4096}})
    with pytest.raises(PartitionError, match=r"sub_microbatch_tokens\.vision"):
        parse_partition(data | {"sub_microbatch_tokens": {"vision": 0}})


def test_a_partition_of_other_modules_is_refused():
    problem, _ = encoder_case()
    with pytest.raises(PartitionError, match=r"expected \['language', 'vision'"):
        make_graph(problem, partition_from_layers({"language": [[1, 1]]}, 2))
    short = partition_from_layers({"vision": [[1, 1]], "language": [[1, 0]]}, 2)
    with pytest.raises(PartitionError, match="module language: stages hold 1 layers"):
        make_graph(problem, short)


def test_layers_are_cut_as_evenly_as_they_can_be():
    assert cut_evenly(7, 2, 2) == ((2, 2), (2, 1))
    with pytest.raises(PartitionError, match="3 layers cannot fill"):
        cut_evenly(3, 2, 2)


def test_empty_stages_are_left_out_but_for_the_first_and_last():
    partition = partition_from_layers({"vision": [[0, 0, 2], [1, 0, 0]]}, 3)
    places = [(s.segment, s.rank, s.num_layers) for s in partition.chains["vision"]]
    assert places == [(0, 0, 0), (0, 2, 2), (1, 0, 1), (1, 2, 0)]


def test_messages_go_along_the_module_graph():
    graph = make_graph(*encoder_case())
    assert graph.forward_inputs(Work(2, 0, 0)) == (
        Message(1, 2, 0, 0, False),
        Message(1, 2, 0, 1, False),
    )
    assert graph.forward_inputs(Work(2, 1, 0)) == ()
    assert graph.backward_inputs(Work(1, 0, 1)) == (Message(2, 1, 0, 1, True),)
    assert graph.contributors(Message(2, 1, 0, 1, True)) == (Work(2, 0, 0),)


def test_a_gradient_sums_over_all_readers_of_an_output():
    problem = make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 1, "language": 1},
        [
            {
                "vision": [make_item(0), make_item(1)],
                "language": [make_item(0, needs={"vision": [0]}), make_item(1)],
            }
        ],
        num_ranks=1,
    )
    graph = make_graph(problem, partition_from_layers({"vision": [[1]], "language": [[1]]}, 1))
    both = (Work(1, 0, 0), Work(1, 0, 1))
    assert graph.contributors(Message(1, 0, 0, 0, True)) == both
    assert graph.contributors(Message(1, 0, 0, 1, True)) == both[1:]


@pytest.mark.parametrize(
    ("subs", "message"),
    [
        ([("language", 0, 0, (0,))], "missing or without items"),
        ([("language", 0, 0, ()), ("language", 1, 0, (0,))], "expected sub-microbatches 0, 1"),
        ([("language", 0, 1, (0,)), ("language", 1, 0, (0,))], "sub-microbatches .1. hold"),
    ],
)
def test_sub_microbatches_that_miss_items_are_refused(subs, message):
    problem, partition = chain_case(1, 2)
    with pytest.raises(PlanError, match=message):
        PipelineGraph(problem, partition, [SubMicrobatch(*sub) for sub in subs])


def test_costs_follow_the_written_rules():
    extras = {"first_extra_forward_us": 0.5, "last_extra_weight_grad_us": 0.25}
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": 5},
        [{"language": [make_item(0, 2.0, **extras), make_item(1, 3.0, recompute_us=1.0)]}],
        num_ranks=2,
        overhead_us=10.0,
    )
    partition = partition_from_layers({"language": [[3, 2]]}, 2)
    graph = PipelineGraph(problem, partition, form_sub_microbatches(problem, {}))
    first, last = zip(*(column.tolist() for column in work_costs(graph)), strict=True)
    assert first == (3 * 15.0 + 0.5, 45.0, 15.0, 13.0, 3 * 20, 12, 20, 8)
    assert last == (2 * 15.0, 30.0, 10.25, 13.0, 2 * 20, 12, 20, 8)


@pytest.mark.parametrize("times", [[1e16, *[1.0] * 10], [*[1.0] * 10, 1e16]])
def test_sums_over_items_do_not_depend_on_their_order(times):
    items = [make_item(number, time) for number, time in enumerate(times)]
    problem = make_problem(
        MODULE_GRAPHS["one module"], {"language": 1}, [{"language": items}], num_ranks=1
    )
    graph = make_graph(problem, partition_from_layers({"language": [[1]]}, 1), max_tokens=None)
    assert work_costs(graph).forward_us.tolist() == [1e16 + 10]


def test_a_changed_copy_does_not_remember_what_the_original_computed():
    problem, _ = encoder_case()
    assert problem.item("vision", 0, 0).forward_us == 1.0
    assert len(problem.items("vision", 0)) == 2
    swapped = problem.model_copy(update={"microbatches": problem.microbatches[::-1]})
    assert swapped.items("vision", 0) == ()
    with pytest.raises(KeyError):
        swapped.item("vision", 0, 0)
