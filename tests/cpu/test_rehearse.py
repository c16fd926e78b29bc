"""Rehearsals: real processes, executor and transfers, with computing replaced by sleeping."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from toy_modules import Case
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.errors import ExecutionError
from megatron_dip.partition import partition_from_layers
from megatron_dip.plan import save_plan
from megatron_dip.planner import make_plan
from megatron_dip.rehearsal import rehearse

CASE = Case(
    name="encoder",
    upstream={"vision": (), "language": ("vision",)},
    batch=[
        {"vision": [3, 2], "language": [4]},
        {"language": [4]},
        {"vision": [2], "language": [5]},
    ],
    cut={"vision": [[1, 1]], "language": [[1, 1], [1, 1]]},
)
LONG_ACTIONS = 4000.0
"""Makes actions last tens of milliseconds, beside which what the host adds is little."""


@pytest.fixture(scope="module")
def plan():
    partition = partition_from_layers(CASE.cut, num_ranks=2)
    limits = {"vision": 3, "language": None}
    return make_plan(CASE.problem(2), partition, max_tokens=limits, split_backward=True)


def test_a_rehearsal_takes_no_less_than_predicted_and_writes_what_it_measured(plan, tmp_path):
    """How much more it takes tells how busy the machine is; the benchmark measures that.

    But among all actions one at least is about on time, however busy the machine is.
    """
    save_plan(plan, tmp_path / "plan.json")
    options = ("--time-scale", LONG_ACTIONS, "--repetitions", "3", "--json")
    files = ("--html", tmp_path / "page.html", "--trace", tmp_path / "trace.json")
    arguments = ["rehearse", tmp_path / "plan.json", *options, *files]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert len(result["repetitions_us"]) == 3
    assert result["achieved_us"] == sorted(result["repetitions_us"])[1]
    assert result["ratio"] > 0.999
    assert all(rank["achieved_us"] > 0.95 * rank["predicted_us"] for rank in result["ranks"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rehearsed, predicted = (
        {
            event["name"]: event["dur"]
            for event in events
            if event["pid"] == panel and event["ph"] == "X" and not event["cat"].endswith("wait")
        }
        for panel in (0, 1)
    )
    assert min(rehearsed[name] / predicted[name] for name in predicted) < 1.5
    assert rehearsed.keys() >= {str(a) for line in plan.actions for a in line if a.type.is_compute}
    assert "rehearsed" in (tmp_path / "page.html").read_text()


def test_a_rank_that_is_killed_ends_the_rehearsal_with_its_name_and_leaves_no_process(plan):
    """Undisturbed, it would take minutes."""

    def kill_one() -> None:
        deadline = time.monotonic() + 240
        while len(ranks := multiprocessing.active_children()) < plan.problem.num_ranks:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        # In the middle of it, as a rule; at its start it ends in the same way.
        time.sleep(1.0)
        os.kill(max(rank.pid for rank in ranks), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ExecutionError, match=r"rank \d of the rehearsal was killed by SIGKILL"):
        rehearse(plan, time_scale=1e6)
    killer.join()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time-scale", "0"), "--time-scale 0: expected a number above 0"),
        (("--transfer-scale", "-1"), "--transfer-scale -1: expected a number above 0"),
        (("--repetitions", "0"), "--repetitions 0: expected at least 1"),
    ],
)
def test_a_scale_that_is_none_is_refused_before_anything_starts(plan, tmp_path, options, message):
    save_plan(plan, tmp_path / "plan.json")
    done = CliRunner().invoke(app, ["rehearse", str(tmp_path / "plan.json"), *options])
    assert done.exit_code == 2
    assert message in done.output


def test_a_plan_that_is_no_correct_schedule_is_refused(plan, tmp_path):
    save_plan(plan, tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["ranks"][0]["actions"].pop(0)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    done = CliRunner().invoke(app, ["rehearse", str(tmp_path / "plan.json")])
    assert done.exit_code == 2
    assert "is missing from rank 0" in done.output
