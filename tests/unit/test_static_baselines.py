"""Megatron's static schedules and zero-bubble: closed forms, costs of cuts, memory, fitting."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import MODULE_GRAPHS, cases, encoder_case, make_graph, make_item, make_problem

from megatron_dip.errors import InfeasibleError, PartitionError, ProblemError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import Action, ActionType
from megatron_dip.planner.baselines import (
    FlatChain,
    StaticCut,
    StaticCuts,
    StaticSimulator,
    run_with_own_recomputation,
    run_within_memory,
    run_zero_bubble,
)
from megatron_dip.planner.baselines.cuts import balanced_layers, even_layers
from megatron_dip.planner.baselines.megatron_orders import (
    interleaved_order,
    microbatch_group_size,
    one_f_one_b_order,
)
from megatron_dip.simulator import build_task_table, simulate_order
from megatron_dip.workload import Problem

TIMES = [(1.0, 1.0, 1.0), (1.0, 1.5, 0.5), (2.0, 3.0, 1.0)]


def uniform_problem(num_layers: int, num_ranks: int, num_microbatches: int, **fields) -> Problem:
    return make_problem(
        MODULE_GRAPHS["one module"],
        {"language": num_layers},
        [{"language": [make_item(0, **fields)]} for _ in range(num_microbatches)],
        num_ranks=num_ranks,
    )


def run_uniform(num_virtual: int, num_ranks: int, num_microbatches: int, times, run=None):
    forward_us, input_grad_us, weight_grad_us = times
    problem = uniform_problem(
        num_virtual * num_ranks,
        num_ranks,
        num_microbatches,
        forward_us=forward_us,
        input_grad_us=input_grad_us,
        weight_grad_us=weight_grad_us,
    )
    chain = FlatChain(problem)
    cut = StaticCut(num_ranks=num_ranks, num_layers=(1,) * (num_virtual * num_ranks))
    return run(chain, cut) if run else StaticSimulator(chain).run(cut)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 4), (4, 3), (4, 9)])
def test_one_f_one_b_takes_its_closed_form(num_ranks, num_microbatches, times):
    run = run_uniform(1, num_ranks, num_microbatches, times)
    assert run.makespan_us == (num_microbatches + num_ranks - 1) * sum(times)
    held = [10 * min(num_ranks - rank, num_microbatches) for rank in range(num_ranks)]
    assert list(run.peak_bytes) == held


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("num_virtual", [2, 3])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 2), (2, 6), (4, 8)])
def test_interleaved_takes_its_closed_form(num_ranks, num_microbatches, num_virtual, times):
    run = run_uniform(num_virtual, num_ranks, num_microbatches, times)
    assert run.makespan_us == (num_virtual * num_microbatches + num_ranks - 1) * sum(times)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 4), (4, 8), (8, 24)])
def test_zero_bubble_takes_the_closed_form_of_zb_h1_in_the_memory_of_1f1b(
    num_ranks, num_microbatches, times
):
    run = run_uniform(1, num_ranks, num_microbatches, times, run=run_zero_bubble)
    forward_us, input_grad_us, weight_grad_us = times
    bubble_us = (num_ranks - 1) * (forward_us + input_grad_us - weight_grad_us)
    assert run.makespan_us == num_microbatches * sum(times) + bubble_us
    whole = run_uniform(1, num_ranks, num_microbatches, times)
    assert max(run.peak_bytes) == max(whole.peak_bytes)


def test_the_interleaved_order_is_megatrons_table():
    def text(rank: int) -> str:
        steps = interleaved_order(2, 2, 4, rank)
        return " ".join(f"{s.chunk}{'B' if s.is_backward else 'F'}{s.microbatch}" for s in steps)

    assert text(0) == "0F0 0F1 1F0 1F1 0F2 1B0 0F3 1B1 1F2 0B0 1F3 0B1 1B2 1B3 0B2 0B3"
    assert text(1) == "0F0 0F1 1F0 1B0 1F1 1B1 0F2 0B0 0F3 0B1 1F2 1B2 1F3 1B3 0B2 0B3"


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "expected"),
    [(4, 4, 4), (4, 8, 4), (4, 9, 5), (4, 10, 5), (4, 7, 7), (4, 11, 6), (1, 3, 1)],
)
def test_microbatch_groups_are_the_smallest_that_megatron_takes(
    num_ranks, num_microbatches, expected
):
    assert microbatch_group_size(num_ranks, num_microbatches) == expected


def test_fewer_microbatches_than_ranks_cannot_be_interleaved():
    chain = FlatChain(uniform_problem(8, 4, 3))
    with pytest.raises(InfeasibleError, match="3 microbatches on 4 ranks"):
        StaticSimulator(chain).run(StaticCut(num_ranks=4, num_layers=(1,) * 8))


@given(
    layers=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    times=st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=1, max_size=6),
    latency_us=st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=60)
def test_a_chain_of_one_module_costs_what_its_plan_costs(layers, times, latency_us):
    problem = make_problem(
        MODULE_GRAPHS["one module"],
        {"language": sum(layers)},
        [
            {"language": [make_item(0, time, last_extra_forward_us=2.0, boundary_bytes=3)]}
            for time in times
        ],
        num_ranks=len(layers),
        overhead_us=0.5,
        layer_static_bytes=100,
        latency_us=latency_us,
        bytes_per_us=2.0,
    )
    partition = partition_from_layers({"language": [layers]}, len(layers))
    table = build_task_table(make_graph(problem, partition, None))
    order = [
        [
            Action(rank, ActionType("B" if step.is_backward else "F"), step.microbatch)
            for step in one_f_one_b_order(len(layers), len(times), rank)
        ]
        for rank in range(len(layers))
    ]
    expected = simulate_order(table, order)
    run = StaticSimulator(FlatChain(problem)).run(
        StaticCut(num_ranks=len(layers), num_layers=tuple(layers))
    )
    assert run.makespan_us == expected.makespan_us
    assert run.peak_bytes == expected.peak_bytes
    assert run.busy_us == expected.busy_us


@given(case=cases(), data=st.data())
@settings(max_examples=100)
def test_no_cut_changes_the_sum_of_all_costs(case, data):
    problem, _ = case
    alone = problem.model_copy(
        update={"num_ranks": 1, "memory_limit_bytes": problem.memory_limit_bytes[:1]}
    )
    layers = {module.name: [[module.num_layers]] for module in problem.modules}
    partition = partition_from_layers(layers, 1)
    expected = build_task_table(make_graph(alone, partition, None))
    chain = FlatChain(problem)
    places = data.draw(
        st.lists(
            st.integers(0, chain.num_layers),
            min_size=problem.num_ranks - 1,
            max_size=problem.num_ranks - 1,
        )
    )
    counts = np.diff([0, *sorted(places), chain.num_layers]).tolist()
    total = chain.costs(StaticCut(num_ranks=problem.num_ranks, num_layers=tuple(counts))).total
    for field in ("forward_us", "input_grad_us", "weight_grad_us", "stored_bytes"):
        assert getattr(total, field).sum() == getattr(expected, field).sum()
    assert total.static_bytes.sum() == expected.static_bytes.sum()


@given(case=cases(), num_virtual=st.integers(1, 2), data=st.data())
@settings(max_examples=100)
def test_the_quick_time_and_the_drawn_bars_are_those_of_the_run(case, num_virtual, data):
    problem, _ = case
    chain = FlatChain(problem)
    num_pieces = problem.num_ranks * num_virtual
    if num_virtual > 1 and problem.num_microbatches < problem.num_ranks:
        num_pieces = problem.num_ranks
    places = data.draw(
        st.lists(st.integers(0, chain.num_layers), min_size=num_pieces - 1, max_size=num_pieces - 1)
    )
    counts = np.diff([0, *sorted(places), chain.num_layers]).tolist()
    cut = StaticCut(num_ranks=problem.num_ranks, num_layers=tuple(counts))
    simulator = StaticSimulator(chain)
    runs = [simulator.run(cut)]
    assert simulator.makespan_us(cut) == pytest.approx(runs[0].makespan_us, rel=1e-12)
    if cut.num_virtual == 1:
        runs.append(run_zero_bubble(chain, cut))
    for run in runs:
        panel = run.panel("any")
        for rank in range(problem.num_ranks):
            bars = [span for span in panel.spans if span.rank == rank]
            lengths = sum(span.end_us - span.start_us for span in bars)
            assert lengths == pytest.approx(run.busy_us[rank], rel=1e-12)
            ends = [(span.start_us, span.end_us) for span in sorted(bars, key=lambda s: s.start_us)]
            assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(ends))
            assert max(held for _, held in panel.memory[rank]) == run.peak_bytes[rank]
            assert panel.memory[rank][-1][1] == panel.memory[rank][0][1]


def test_between_pieces_travels_what_later_layers_need():
    problem = make_problem(
        MODULE_GRAPHS["two encoders"],
        {"vision": 2, "audio": 2, "language": 2},
        [
            {
                "vision": [make_item(0, boundary_bytes=10), make_item(1, boundary_bytes=10)],
                "audio": [make_item(0, boundary_bytes=100)],
                "language": [make_item(0, boundary_bytes=1000)],
            },
            {"language": [make_item(0, boundary_bytes=1000)]},
        ],
        num_ranks=2,
        latency_us=5.0,
        bytes_per_us=1.0,
    )
    delays = FlatChain(problem).delay_at_us[1:-1]
    assert delays[:, 0].tolist() == [25.0, 25.0, 125.0, 125.0, 1005.0]
    assert delays[:, 1].tolist() == [5.0, 5.0, 5.0, 5.0, 1005.0]


def test_a_microbatch_without_images_passes_the_encoder_in_no_time():
    problem, _ = encoder_case(latency_us=1.0)
    cut = StaticCut(num_ranks=2, num_layers=(2, 2))
    total = FlatChain(problem).costs(cut).total
    assert total.forward_us.tolist() == [[4.0, 0.0], [4.0, 4.0]]
    assert total.stored_bytes.tolist() == [[40, 0], [20, 20]]


@pytest.mark.parametrize(
    ("graph", "cut", "backwards", "weight_grads"),
    [
        ("encoder", (1, 3), [True, True], [True, True]),
        ("frozen encoder", (2, 2), [False, True], [False, True]),
        ("frozen encoder", (3, 1), [True, True], [True, True]),
        ("frozen backbone", (2, 2), [True, True], [True, False]),
    ],
)
def test_only_what_is_trainable_or_follows_it_has_a_backward(graph, cut, backwards, weight_grads):
    problem, _ = encoder_case(graph)
    chain = FlatChain(problem)
    static = StaticCut(num_ranks=2, num_layers=cut)
    assert chain.has_backward(static) == backwards
    assert chain.has_weight_grad(static) == weight_grads
    kinds = {(span.rank, span.kind) for span in StaticSimulator(chain).run(static).panel("p").spans}
    assert {rank for rank, kind in kinds if kind in "BI"} == {
        rank for rank, has_backward in enumerate(backwards) if has_backward
    }


def test_a_piece_of_two_modules_is_drawn_as_a_bar_for_each():
    problem, _ = encoder_case()
    run = StaticSimulator(FlatChain(problem)).run(StaticCut(num_ranks=2, num_layers=(3, 1)))
    bars = [
        (span.module, span.action, span.start_us, span.end_us)
        for span in run.panel("mixed").spans
        if span.rank == 0
    ]
    assert bars[:2] == [("vision", "0F0", 0.0, 4.0), ("language", "0F0", 4.0, 6.0)]
    assert [bar[:2] for bar in bars[-2:]] == [("vision", "0B0"), ("language", "0B1")]
    backward = [bar for bar in bars if bar[1] == "0B0"]
    assert [bar[0] for bar in backward] == ["language", "vision"]


def test_the_fewest_layers_are_recomputed_that_keep_the_limit():
    free = uniform_problem(8, 2, 4)
    cut = StaticCut(num_ranks=2, num_layers=(4, 4))
    # Two microbatches of four layers at 10 bytes; a recomputed layer keeps 4.
    limited = free.model_copy(update={"memory_limit_bytes": (60, 60)})
    run = run_within_memory(StaticSimulator(FlatChain(limited)), cut)
    assert run.num_recomputed == 2
    assert run.peak_bytes == (56, 28)
    unlimited = StaticSimulator(FlatChain(free)).run(cut)
    assert unlimited.peak_bytes == (80, 40)
    assert run.makespan_us == unlimited.makespan_us + 5 * 2.0
    assert run_within_memory(StaticSimulator(FlatChain(free)), cut).num_recomputed == 0


def test_every_rank_recomputes_what_its_own_limit_asks_for():
    free = uniform_problem(8, 2, 4)
    cut = StaticCut(num_ranks=2, num_layers=(4, 4))
    limited = free.model_copy(update={"memory_limit_bytes": (60, 40)})
    run = run_with_own_recomputation(StaticSimulator(FlatChain(limited)), cut)
    assert run.num_recomputed == (2, 0)
    assert run.peak_bytes == (56, 40)
    assert run.makespan_us < run_within_memory(StaticSimulator(FlatChain(limited)), cut).makespan_us
    hopeless = free.model_copy(update={"memory_limit_bytes": (31, 99)})
    with pytest.raises(InfeasibleError, match=r"rank 0: 32 bytes .*limit 31"):
        run_with_own_recomputation(StaticSimulator(FlatChain(hopeless)), cut)


def test_a_cut_for_the_limit_gives_the_tight_rank_fewer_layers():
    problem = uniform_problem(8, 2, 4).model_copy(update={"memory_limit_bytes": (60, 99)})
    cut = StaticCuts([problem]).nnscaler
    best_us = min(
        run_with_own_recomputation(
            StaticSimulator(FlatChain(problem)), StaticCut(num_ranks=2, num_layers=(n, 8 - n))
        ).makespan_us
        for n in range(1, 8)
    )
    found = run_with_own_recomputation(StaticSimulator(FlatChain(problem)), cut)
    assert found.makespan_us == best_us


def test_an_interleaved_cut_for_the_limit_recomputes_less_than_one_without():
    free = uneven_problem()
    tight = free.model_copy(update={"memory_limit_bytes": (90, 200, 200)})
    cuts = StaticCuts([tight])
    simulator = StaticSimulator(FlatChain(tight))
    limited, unlimited = (
        run_within_memory(simulator, cut)
        for cut in (cuts.interleaved_within_memory, cuts.interleaved)
    )
    assert limited.makespan_us < unlimited.makespan_us
    assert StaticCuts([free]).interleaved_within_memory == cuts.interleaved
    hopeless = free.model_copy(update={"memory_limit_bytes": (1, 1, 1)})
    with pytest.raises(InfeasibleError, match="several pieces per rank"):
        _ = StaticCuts([hopeless]).interleaved_within_memory


def test_megatrons_chunks_have_equal_parameters_whatever_time_they_take():
    problem = uneven_problem()
    sizes = {"vision": 6, "language": 18}
    weighed = problem.model_copy(
        update={
            "modules": tuple(
                module.model_copy(update={"layer_static_bytes": sizes[module.name]})
                for module in problem.modules
            )
        }
    )
    parameters = FlatChain(weighed).layer_parameters
    assert parameters.tolist() == [1.0] * 6 + [3.0] * 6
    assert even_layers(parameters, 6) == (4, 3, 1, 1, 1, 2)
    cuts = StaticCuts([weighed])
    assert cuts.megatron_in_four.num_layers == (1,) * 12
    assert cuts.megatron.num_layers == even_layers(parameters, len(cuts.megatron.num_layers))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=7), st.integers(1, 4))
def test_even_layers_have_the_least_squares_of_all_cuts(weights, num_pieces):
    if len(weights) < num_pieces:
        with pytest.raises(InfeasibleError, match="cannot fill"):
            even_layers(np.array(weights), num_pieces)
        return

    def squares(counts) -> float:
        ends = np.cumsum((0, *counts))
        return sum(sum(weights[a:b]) ** 2 for a, b in itertools.pairwise(ends))

    counts = even_layers(np.array(weights), num_pieces)
    assert sum(counts) == len(weights) and min(counts) >= 1
    assert squares(counts) == min(map(squares, compositions(len(weights), num_pieces)))


def test_recomputed_layers_are_counted_where_there_is_a_backward():
    problem, _ = encoder_case("frozen encoder")
    chain = FlatChain(problem)
    cut = StaticCut(num_ranks=2, num_layers=(3, 1))
    free, limited = chain.costs(cut), chain.costs(cut, num_recomputed=1)
    again_us = limited.total.input_grad_us - free.total.input_grad_us
    assert again_us.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert free.total.stored_bytes.tolist() == [[10, 10], [10, 10]]
    assert limited.total.stored_bytes.tolist() == [[4, 4], [4, 4]]


def test_a_limit_that_recomputing_everything_does_not_keep_names_rank_and_need():
    limited = uniform_problem(8, 2, 4).model_copy(update={"memory_limit_bytes": (31, 99)})
    cut = StaticCut(num_ranks=2, num_layers=(4, 4))
    with pytest.raises(InfeasibleError, match=r"rank 0: 32 bytes .*limit 31"):
        run_within_memory(StaticSimulator(FlatChain(limited)), cut)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_balanced_layers_are_as_good_as_the_best_of_all_cuts(layer_us, num_pieces):
    if len(layer_us) < num_pieces:
        with pytest.raises(InfeasibleError, match="cannot fill"):
            balanced_layers(np.array(layer_us), num_pieces)
        return

    def largest(counts) -> float:
        ends = np.cumsum((0, *counts))
        return max(sum(layer_us[a:b]) for a, b in itertools.pairwise(ends))

    counts = balanced_layers(np.array(layer_us), num_pieces)
    assert sum(counts) == len(layer_us)
    assert min(counts) >= 1
    assert largest(counts) == min(map(largest, compositions(len(layer_us), num_pieces)))


def compositions(total: int, parts: int):
    for places in itertools.combinations(range(1, total), parts - 1):
        yield tuple(np.diff([0, *places, total]).tolist())


def uneven_problem(num_microbatches: int = 4) -> Problem:
    return make_problem(
        MODULE_GRAPHS["encoder"],
        {"vision": 6, "language": 6},
        [
            {
                "vision": [make_item(image, 1.5) for image in range(number % 3)],
                "language": [make_item(0, 1.0 + number % 2, last_extra_forward_us=4.0)],
            }
            for number in range(num_microbatches)
        ],
        num_ranks=3,
    )


def test_the_fitted_cut_of_1f1b_is_the_best_of_all():
    problem = uneven_problem()
    simulator = StaticSimulator(FlatChain(problem))
    best_us = min(
        simulator.makespan_us(StaticCut(num_ranks=3, num_layers=counts))
        for counts in compositions(12, 3)
    )
    assert simulator.makespan_us(StaticCuts([problem]).one_f_one_b) == best_us


def test_fitted_cuts_are_no_slower_than_stock_ones_and_the_same_every_time():
    samples = [uneven_problem(), uneven_problem(5)]
    cuts, again = StaticCuts(samples), StaticCuts(samples)
    assert cuts.one_f_one_b_stock.num_layers == (8, 2, 2)
    assert cuts.interleaved_stock.num_layers == (7, 1, 1, 1, 1, 1)
    assert cuts.interleaved.num_virtual > 1
    for kind in ("one_f_one_b", "interleaved"):
        assert getattr(cuts, kind) == getattr(again, kind)
        fitted, stock = (
            sum(
                StaticSimulator(FlatChain(sample)).makespan_us(getattr(cuts, name))
                for sample in samples
            )
            for name in (kind, f"{kind}_stock")
        )
        assert fitted <= stock


def test_bad_samples_and_cuts_say_what_is_wrong():
    with pytest.raises(ProblemError, match="at least one"):
        StaticCuts([])
    with pytest.raises(
        ProblemError, match=r"language \(4 layers\) on 2 ranks.*\(expected the same"
    ):
        StaticCuts([uneven_problem(), uniform_problem(4, 2, 2)])
    with pytest.raises(InfeasibleError, match="4 layers on 4 ranks"):
        _ = StaticCuts([uniform_problem(4, 4, 8)]).interleaved
    with pytest.raises(InfeasibleError, match="a layer on every rank"):
        _ = StaticCuts([uniform_problem(3, 4, 8)]).one_f_one_b_stock
    with pytest.raises(PartitionError, match="equally many pieces"):
        StaticCut(num_ranks=2, num_layers=(1, 1, 1))
    with pytest.raises(PartitionError, match="static cut of 2 layers for modules of 4"):
        FlatChain(uniform_problem(4, 2, 2)).costs(StaticCut(num_ranks=2, num_layers=(1, 1)))
