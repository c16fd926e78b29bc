"""Reading back what runs measured."""

import json

import pytest
from planning_cases import chain_case

from megatron_dip.errors import DataError
from megatron_dip.planner import make_plan
from megatron_dip.report import measured_panel, module_slowness, read_traces
from megatron_dip.report.local_run import _ITERATION
from megatron_dip.simulator import simulate
from megatron_dip.simulator.timeline import idle_fractions


def write_trace(folder, rank, iteration, spans, start=100.0, end=200.0, file=None):
    line = {
        "schedule": "dip",
        "iteration": iteration,
        "rank": rank,
        "start_us": start,
        "end_us": end,
        "spans": spans,
    }
    with open(folder / f"rank{file if file is not None else rank:05d}.jsonl", "a") as out:
        out.write(json.dumps(line) + "\n")


def test_idle_time_is_what_is_neither_computing_nor_loading(tmp_path):
    spans = [
        ["data", 100.0, 110.0, False],
        ["0F0", 110.0, 150.0, False],
        ["0B0", 150.0, 180.0, True],
    ]
    write_trace(tmp_path, 0, 1, spans)
    write_trace(tmp_path, 1, 1, [["1F0", 150.0, 175.0, False]], start=105.0)
    (trace,) = read_traces(tmp_path)
    assert trace.duration_us == 100.0
    assert trace.idle_fractions == (0.5, 0.75)


def test_an_iteration_that_a_rank_did_not_finish_is_left_out(tmp_path):
    for rank in (0, 1):
        write_trace(tmp_path, rank, 1, [])
    write_trace(tmp_path, 0, 2, [])
    assert [trace.iteration for trace in read_traces(tmp_path)] == [1]


def test_of_tensor_parallel_peers_the_first_one_counts(tmp_path):
    write_trace(tmp_path, 0, 1, [["0F0", 100.0, 120.0, False]], file=0)
    write_trace(tmp_path, 0, 1, [["0F0", 100.0, 199.0, False]], file=1)
    (trace,) = read_traces(tmp_path)
    assert len(trace.ranks) == 1
    assert trace.ranks[0].busy_us == 20.0


def test_a_folder_without_traces_is_refused(tmp_path):
    with pytest.raises(DataError, match="no traces"):
        read_traces(tmp_path)


def test_a_line_that_is_no_trace_is_named(tmp_path):
    (tmp_path / "rank00000.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(DataError, match=r"rank00000.jsonl, line 1"):
        read_traces(tmp_path)


def planned_trace(folder, slowness):
    """A plan, and a trace in which every action took ``slowness`` times what it should."""
    plan = make_plan(*chain_case(2, 3))
    for rank, line in enumerate(simulate(plan).timelines):
        spans = [
            [str(one.action), one.start_us * slowness, one.end_us * slowness, False] for one in line
        ]
        end = max(span[2] for span in spans)
        write_trace(folder, rank, 1, spans, start=0.0, end=end)
    return read_traces(folder)[0], plan


def test_slowness_is_measured_over_predicted_time(tmp_path):
    trace, plan = planned_trace(tmp_path, 2.5)
    (module,) = plan.problem.module_order
    assert module_slowness([(trace, plan)]) == {module: pytest.approx(2.5)}


def test_a_measured_panel_idles_as_much_as_the_plan_that_it_followed(tmp_path):
    trace, plan = planned_trace(tmp_path, 1.0)
    panel = measured_panel(trace, "measured", plan.partition)
    assert {span.module for span in panel.spans} == set(plan.problem.module_order)
    assert idle_fractions(panel) == pytest.approx(simulate(plan).bubble_fraction)


def test_megatrons_log_line_is_understood():
    line = (
        " [2026-01-01 00:00:00.1] iteration       12/      60 | consumed samples:           96 | "
        "elapsed time per iteration (ms): 1431.9 | learning rate: 8.2E-04 | global batch size:  8 "
        "| lm loss: 8.065299E+00 | loss scale: 1.0 | grad norm: 6.053 | number of skipped"
    )
    found = _ITERATION.search(line)
    assert found is not None
    assert (int(found["number"]), float(found["elapsed_ms"])) == (12, 1431.9)
    assert (float(found["loss"]), float(found["grad_norm"])) == (8.065299, 6.053)
    assert _ITERATION.search("iteration 12 without figures") is None
