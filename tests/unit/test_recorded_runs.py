"""From what a run has recorded: a cut for it, and the times of its layers."""

from dataclasses import replace
from random import Random

import pytest
from machine_cases import PARTITION, Machine, batch
from test_fit import STATED, recorded
from typer.testing import CliRunner

from megatron_dip.cli.main import app
from megatron_dip.costs import Parallelism, load_profile
from megatron_dip.costs.profile import ProfiledTimes, profile_without_times
from megatron_dip.partition import load_partition
from megatron_dip.planner import make_plan
from megatron_dip.report.trace_files import TraceFiles


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight steps of two ranks, the first of which take much longer."""
    path = tmp_path_factory.mktemp("trace")
    steps, _ = recorded(Machine(slowness=(1.0, 1.0), gradient=1.0), num_steps=8)
    for rank in range(2):
        files = TraceFiles(path, "20260101-000000-abcd", rank=rank, replica=0)
        for number, (trace, plan) in enumerate(steps, start=1):
            own = trace.ranks[rank]
            slowness = 30.0 if number < 3 else 1.0
            line = {
                "schedule": "dip",
                "iteration": number,
                "rank": rank,
                "num_ranks": 2,
                "start_us": own.start_us,
                "end_us": own.end_us * slowness,
                "spans": [
                    [span.label, span.start_us * slowness, span.end_us * slowness, span.is_wait]
                    for span in own.spans
                ],
            }
            files.write_timeline(line, plan if rank == 0 else None)
    files.write_machine(
        profile_without_times(STATED.model, Parallelism(), device="CPU", is_fp32=True)
    )
    return path


def makespan_us(partition):
    """Of batches that the run has not seen, on the machine as it is."""
    machine, random = Machine(), Random(99)
    return sum(
        make_plan(machine.problems.build(batch(random)), partition).estimate.makespan_us
        for _ in range(3)
    )


def test_a_cut_is_chosen_from_the_batches_of_a_run(folder, tmp_path):
    result = run(
        *("partition", "--from", folder, "--batches", 2, "--changes", 40, "--evaluations", 8),
        *("-o", tmp_path / "cut.json"),
    )
    assert result.exit_code == 0, result.output
    assert "language: times fitted to" in result.output
    assert makespan_us(load_partition(tmp_path / "cut.json")) < 0.9 * makespan_us(PARTITION)


def test_a_profile_is_fitted_to_the_steps_of_a_run(folder, tmp_path):
    result = run("profile", "--from", folder, "-o", tmp_path / "profile.json")
    assert result.exit_code == 0, result.output
    profile = load_profile(tmp_path / "profile.json")
    assert (profile.device, profile.precision) == ("CPU", "fp32")
    times = ProfiledTimes.for_model(profile, STATED.model, Parallelism())
    sizes = batch(Random(7))
    problem = replace(STATED, times=times).build(sizes)
    true = Machine().problems.build(sizes)
    for number in range(problem.num_microbatches):
        ours, theirs = (one.item("language", number, 0) for one in (problem, true))
        assert ours.forward_us == pytest.approx(theirs.forward_us, rel=0.05)
        assert ours.last_extra_forward_us == pytest.approx(theirs.last_extra_forward_us, rel=0.05)


def test_a_folder_without_steps_is_said_in_one_line(folder, tmp_path):
    for command in ("partition", "profile"):
        result = run(command, "--from", tmp_path, "-o", tmp_path / "out.json")
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert "no traces" in result.output
        result = run(command, "-o", tmp_path / "out.json")
        assert result.exit_code == 2 and "expected" in result.output


def test_steps_of_a_run_that_only_warmed_up_are_not_enough(folder, tmp_path):
    lines = (folder / "rank00000.jsonl").read_text().splitlines()[:2]
    for rank in range(2):
        lines = (folder / f"rank{rank:05d}.jsonl").read_text().splitlines()[:2]
        (tmp_path / f"rank{rank:05d}.jsonl").write_text("\n".join(lines) + "\n")
    result = run("profile", "--from", tmp_path, "-o", tmp_path / "out.json")
    assert result.exit_code == 2
    assert "2 timelines of --dip-schedule (expected more than 2" in result.output
