"""Trace folders: writing into ones that cannot be written to, reading what is damaged or mixed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from planning_cases import chain_case

from megatron_dip.errors import DataError
from megatron_dip.files import append_line, write_atomically
from megatron_dip.plan import Plan
from megatron_dip.planner import make_plan
from megatron_dip.report import RankRecord, StepRecord, plan_of_trace, read_records, read_traces
from megatron_dip.report.page import write_report
from megatron_dip.report.steps import AssignmentRecord
from megatron_dip.report.trace_files import TraceFiles
from megatron_dip.simulator import simulate

TWO_RANKS = make_plan(*chain_case(2, 3))
THREE_RANKS = make_plan(*chain_case(3, 3))
FIRST, SECOND = "20260101-000000-aaaa", "20260102-000000-bbbb"


def record(iteration: int, num_ranks: int = 2) -> StepRecord:
    rank = RankRecord(
        busy_us=500.0, data_us=1.0, plan_us=1.0, static_bytes=1, predicted_bytes=9, stored_bytes=9
    )
    return StepRecord(
        iteration=iteration,
        predicted_us=1000.0,
        measured_us=1100.0,
        predicted_step_us=1000.0,
        step_us=1200.0,
        action_error=0.1,
        tokens={"language": 64},
        num_microbatches=3,
        planning={"planning_ms": 1.0, "waited_ms": 0.5},
        ranks=(rank,) * num_ranks,
    )


class Run:
    """A start of a run: what all of its ranks write of an iteration."""

    def __init__(
        self, folder: Path, plan: Plan = TWO_RANKS, name: str = FIRST, num_kept: int | None = None
    ) -> None:
        self.folder, self.plan = folder, plan
        self.lines = simulate(plan).timelines
        self.ranks = [
            TraceFiles(folder, name, rank=rank, replica=0, num_kept=num_kept)
            for rank in range(len(self.lines))
        ]

    def iterate(self, *iterations: int, ranks: int = 99) -> None:
        for iteration in iterations:
            for rank, files in enumerate(self.ranks[:ranks]):
                spans = [[str(t.action), t.start_us, t.end_us, False] for t in self.lines[rank]]
                line = {
                    "schedule": "dip",
                    "iteration": iteration,
                    "rank": rank,
                    "num_ranks": len(self.ranks),
                    "start_us": 0.0,
                    "end_us": 1e6,
                    "spans": spans,
                }
                files.write_timeline(line, self.plan if rank == 0 else None)
            self.ranks[0].write_record(record(iteration, len(self.ranks)))


def iterations_in_page(folder: Path) -> tuple[list[int], list[int], list[str]]:
    """Iterations and timelines of a report, and what it says that it leaves out."""
    page = folder / "report.html"
    write_report(folder, page)
    text = page.read_text().split('type="application/json">')[1].split("</script>")[0]
    data = json.loads(text)
    return data["iterations"], [t["iteration"] for t in data["timelines"]], data["left_out"]


def test_what_a_run_wrote_is_read_back(tmp_path, caplog):
    Run(tmp_path / "new").iterate(1, 2, 3)
    assert iterations_in_page(tmp_path / "new") == ([1, 2, 3], [1, 2, 3], [])
    assert plan_of_trace(tmp_path / "new", read_traces(tmp_path / "new")[0]) == TWO_RANKS
    assert not caplog.records


def test_the_page_says_what_an_assignment_of_samples_did(tmp_path):
    run = Run(tmp_path)
    moved = AssignmentRecord(
        num_moved=11, num_groups=43, replicas=(1.31, 1.0), microbatches=(2.05, 1.62)
    )
    for number in (1, 2):
        run.ranks[0].write_record(record(number, 2).model_copy(update={"assignment": moved}))
    assert read_records(tmp_path)[0].assignment == moved
    page = tmp_path / "report.html"
    write_report(tmp_path, page)
    assert json.dumps("1.31 → 1.00") in page.read_text(encoding="utf-8")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if "nothing can be recorded" in r.message]


def make_file(folder: Path) -> None:
    folder.write_text("in the way")


def make_loop(folder: Path) -> None:
    folder.symlink_to(folder)


def make_folders_for_files(folder: Path) -> None:
    for rank in range(2):
        (folder / f"rank{rank:05d}.jsonl").mkdir(parents=True)
    (folder / "steps-replica0.jsonl").mkdir()


@pytest.mark.parametrize("block", [make_file, make_loop, make_folders_for_files])
def test_a_folder_that_cannot_be_written_to_is_said_once_by_every_rank(tmp_path, caplog, block):
    block(tmp_path / "trace")
    Run(tmp_path / "trace").iterate(1, 2, 3)
    assert len(said(caplog)) == 2
    assert f"recorded in {tmp_path / 'trace'} (" in said(caplog)[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_device_is_said_once(tmp_path, caplog):
    run = Run(tmp_path)
    for name in ("rank00000.jsonl", "rank00001.jsonl", "steps-replica0.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    run.iterate(1, 2)
    assert [message.split("(")[1].split(")")[0] for message in said(caplog)] == [
        "No space left on device"
    ] * 2


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_no_half_of_it(
    tmp_path, caplog, files_no_longer_than
):
    run = Run(tmp_path)
    run.iterate(1)
    sizes = {path: path.stat().st_size for path in tmp_path.glob("*.jsonl")}
    with files_no_longer_than(max(sizes.values()) + 50):
        run.iterate(2)
    assert {path: path.stat().st_size for path in sizes} == sizes
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    run.iterate(3)
    assert iterations_in_page(tmp_path)[:2] == ([1, 3], [1, 3])
    assert len(said(caplog)) == 2


def test_a_folder_that_vanishes_is_made_again(tmp_path, caplog):
    run = Run(tmp_path / "trace")
    run.iterate(1)
    shutil.rmtree(tmp_path / "trace")
    run.iterate(2)
    assert iterations_in_page(tmp_path / "trace") == ([2], [2], [])
    assert not said(caplog)


def test_only_the_newest_timelines_are_kept_where_that_is_asked_for(tmp_path):
    run = Run(tmp_path, num_kept=2)
    run.iterate(1, 2, 3, 40)
    assert sorted(path.name for path in tmp_path.glob("plan-*")) == [
        "plan-replica0-000003.json",
        "plan-replica0-000040.json",
    ]
    assert iterations_in_page(tmp_path) == ([1, 2, 3, 40], [3, 40], [])


def test_damaged_lines_are_left_out_and_named_and_the_others_are_read(tmp_path, caplog):
    run = Run(tmp_path)
    run.iterate(1)
    for path in tmp_path.glob("*.jsonl"):
        text = path.read_bytes()
        path.write_bytes(text + b"\xff\xfe{}\n" + b"[" * 5000 + b"\n" + text[: len(text) // 2])
    run.iterate(2, 3)
    assert iterations_in_page(tmp_path)[:2] == ([1, 2, 3], [1, 2, 3])
    left_out = iterations_in_page(tmp_path)[2]
    assert len(left_out) == 3 and all("line 2" in line and "2 more" in line for line in left_out)
    assert left_out[0] in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iteration", "x"),
        ("iteration", -1),
        ("rank", None),
        ("start_us", float("nan")),
        ("end_us", 10**400),
        ("end_us", 0.0),
        ("spans", [["0F0", 1.0, "2", False]]),
        ("spans", [["0F0", 1.0]]),
        ("spans", 5),
        ("plan", "a file"),
        ("replica", 2.5),
    ],
)
def test_a_timeline_with_a_wrong_value_is_left_out(tmp_path, field, value):
    run = Run(tmp_path)
    run.iterate(1, 2)
    path = tmp_path / "rank00000.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + second + "\n")
    left_out: list[str] = []
    assert [trace.iteration for trace in read_traces(tmp_path, 0, left_out.append)] == [2]
    assert f"{path}, line 1" in left_out[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_us", 0.0),
        ("step_us", 1e308),
        ("measured_us", float("inf")),
        ("iteration", 2**63),
        ("tokens", {}),
        ("tokens", {"language": 10**400}),
        ("ranks", []),
        ("ranks", {}),
        ("surplus", 1),
    ],
)
def test_a_record_with_a_wrong_value_is_left_out(tmp_path, field, value):
    run = Run(tmp_path)
    run.iterate(1, 2)
    path = tmp_path / "steps-replica0.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(first) | {field: value}) + "\n" + second + "\n")
    assert iterations_in_page(tmp_path)[0] == [2]


def test_what_the_planner_said_need_not_be_a_number(tmp_path):
    Run(tmp_path).iterate(1)
    path = tmp_path / "steps-replica0.jsonl"
    data = json.loads(path.read_text())
    data["planning"] = {"planning_ms": float("nan"), "waited_ms": 10**400}
    path.write_text(json.dumps(data) + "\n")
    assert iterations_in_page(tmp_path)[0] == [1]


def test_files_of_damaged_lines_alone_are_refused_by_name(tmp_path):
    (tmp_path / "steps-replica0.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"no records \(.*steps-replica0.jsonl, line 1"):
        read_records(tmp_path)
    (tmp_path / "rank00000.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"no traces \(.*rank00000.jsonl, line 1"):
        read_traces(tmp_path)


def test_another_cut_in_the_same_folder_takes_the_place_of_the_first(tmp_path):
    Run(tmp_path).iterate(1, 2, 3)
    Run(tmp_path, THREE_RANKS, SECOND).iterate(1, 2)
    iterations, timelines, left_out = iterations_in_page(tmp_path)
    assert (iterations, timelines) == ([1, 2], [1, 2])
    assert [len(trace.ranks) for trace in read_traces(tmp_path)] == [3, 3]
    assert f"3 records of run {FIRST} from iteration 1 on" in left_out[0]
    assert f"3 timelines of run {FIRST} from iteration 1 on" in left_out[1]


def test_a_run_that_goes_on_keeps_what_came_before_it(tmp_path):
    Run(tmp_path).iterate(1, 2, 3)
    Run(tmp_path, THREE_RANKS, SECOND).iterate(3, 4)
    iterations, timelines, left_out = iterations_in_page(tmp_path)
    assert (iterations, timelines) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert [trace.run for trace in read_traces(tmp_path)] == [FIRST, FIRST, SECOND, SECOND]
    assert len(left_out) == 2 and all("from iteration 3 on" in line for line in left_out)


def test_the_trace_of_one_run_is_never_drawn_beside_the_plan_of_another(tmp_path):
    """A restart on the same cut: it had written its plan and not all of its timeline."""
    run = Run(tmp_path)
    run.iterate(1, 2)
    other = make_plan(*chain_case(2, 3), algorithm="one_f_one_b")
    text = (tmp_path / "plan-replica0-000002.json").read_text()
    again = Run(tmp_path / "again", other)
    again.iterate(2)
    shutil.copy(tmp_path / "again" / "plan-replica0-000002.json", tmp_path)
    iterations, timelines, left_out = iterations_in_page(tmp_path)
    assert (iterations, timelines) == ([1, 2], [1])
    assert "plan-replica0-000002.json" in left_out[0] and "another run" in left_out[0]
    (tmp_path / "plan-replica0-000002.json").write_text(text[:-200])
    assert "is damaged" in iterations_in_page(tmp_path)[2][0]
    (tmp_path / "plan-replica0-000002.json").unlink()
    assert "cannot be read" in iterations_in_page(tmp_path)[2][0]


def without_names(path: Path) -> None:
    """As earlier versions wrote it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for name in ("run", "replica", "num_ranks", "plan"):
            line.pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_folders_of_earlier_versions_are_read_by_the_same_rules(tmp_path):
    Run(tmp_path).iterate(1, 2, 3)
    Run(tmp_path).iterate(2)
    for path in tmp_path.glob("*.jsonl"):
        without_names(path)
    iterations, timelines, left_out = iterations_in_page(tmp_path)
    assert (iterations, timelines) == ([1, 2], [1, 2])
    assert "2 records of run number 1 from iteration 2 on" in left_out[0]
    Run(tmp_path, THREE_RANKS).iterate(9)
    (tmp_path / "plan-replica0-000001.json").write_text(
        (tmp_path / "plan-replica0-000009.json").read_text()
    )
    left_out.clear()
    found = {trace.iteration: trace for trace in read_traces(tmp_path, 0, left_out.append)}
    with pytest.raises(DataError, match="belongs to another run"):
        plan_of_trace(tmp_path, found[1])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, files_no_longer_than):
    path = tmp_path / "file"
    write_atomically(path, "before")
    with files_no_longer_than(10), pytest.raises(OSError):
        write_atomically(path, "after" * 10)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_half_a_line_of_a_process_that_was_killed_is_ended(tmp_path):
    path = tmp_path / "file"
    path.write_text("half")
    append_line(path, "whole")
    assert path.read_text() == "half\nwhole\n"
