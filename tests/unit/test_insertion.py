"""Schedules by insertion: valid ones, in which nobody waits for what is inserted later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import cases, make_graph

from megatron_dip.planner.insertion import Insertion
from megatron_dip.simulator import build_task_table, simulate_order


@settings(max_examples=40)
@given(case=cases(), seed=st.integers(0, 1000))
def test_the_simulator_gives_an_inserted_order_the_same_times(case, seed):
    table = build_task_table(make_graph(*case))
    graph, random = table.whole, np.random.default_rng(seed)
    insertion = Insertion(graph)
    key_us = random.random(len(graph.exists))
    for _ in range(2):
        starts_us, order = insertion.early(key_us, graph.duration_us)
        ends_us = starts_us + graph.duration_us
        timing = simulate_order(table, order)
        assert timing.makespan_us == pytest.approx(ends_us[graph.exists].max())
        assert timing.starts_us[graph.exists] == pytest.approx(starts_us[graph.exists])
        key_us = insertion.late(starts_us, graph.duration_us)


@settings(max_examples=40)
@given(case=cases(), seed=st.integers(0, 1000))
def test_what_is_inserted_first_does_not_wait_for_the_rest(case, seed):
    table = build_task_table(make_graph(*case))
    graph, random = table.whole, np.random.default_rng(seed)
    is_first = np.tile(table.microbatch == table.microbatch.max(), 3)
    insertion = Insertion(graph)
    later = [1 + random.random(len(is_first)) for _ in range(2)]
    starts_us = [
        insertion.early(np.where(is_first, 0.0, keys), graph.duration_us)[0] for keys in later
    ]
    assert (starts_us[0] == starts_us[1])[is_first & graph.exists].all()
