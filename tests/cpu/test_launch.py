"""The launcher: scripts run as they are, and what is wrong is said in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gpt_runs import GPT_ARGUMENTS, SCRIPT, launch
from launching import CompletedRank

from megatron_dip.errors import DataError, ExecutionError, PlanningError
from megatron_dip.integration import hooks, versions
from megatron_dip.launch import main


def launch_text(folder: Path, script: str, *options: str) -> CompletedRank:
    path = folder / "script.py"
    path.write_text(script)
    return launch(*options, str(path), "first", "--second")


def error_of(completed: CompletedRank) -> str:
    """The only error line; asserts the exit status and that there is no traceback."""
    assert completed.returncode == 2, completed.output
    assert "Traceback" not in completed.output
    errors = [line for line in completed.output.splitlines() if "megatron-dip: error:" in line]
    assert len(errors) == 1, completed.output
    return errors[0]


def test_a_missing_script_is_named() -> None:
    assert "there is no script nowhere.py" in error_of(launch("nowhere.py"))


def test_no_script_shows_the_usage() -> None:
    error = error_of(launch("--cpu"))
    assert "SCRIPT" in error and "usage" in error


def test_an_unknown_option_of_the_launcher_is_named() -> None:
    assert "--gpu" in error_of(launch("--gpu", str(SCRIPT)))


def test_the_script_sees_its_own_arguments_and_its_neighbours_and_hooked_megatron(
    tmp_path: Path,
) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'the neighbour'\n")
    script = """
import sys
from neighbour import NAME
from megatron_dip.integration import enable
from megatron.training import training, arguments
from megatron.core import pipeline_parallel
from megatron.core.pipeline_parallel import schedules
enable()
getters = {id(m.get_forward_backward_func) for m in (training, pipeline_parallel, schedules)}
print(NAME, sys.argv[1:], __name__, len(getters), type(schedules.get_forward_backward_func))
print(schedules.get_forward_backward_func(1, None).__name__)
import argparse
parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
args, _ = parser.parse_known_args(["--dip-schedule", "--dip-trace-interval", "7"])
print(args.dip_schedule, args.dip_trace_interval, args.dip_timeout_seconds, args.dip_trace_dir)
from megatron.core.datasets import utils
utils.compile_helpers()  # As Megatron does at every start; the wheel has nothing to make it from.
print("went on")
"""
    completed = launch_text(tmp_path, script)
    assert completed.returncode == 0, completed.output
    assert "the neighbour ['first', '--second'] __main__ 1" in completed.output
    assert "_ScheduleGetter" in completed.output
    assert "forward_backward_no_pipelining" in completed.output
    assert "True 7 300.0 None" in completed.output
    assert "went on" in completed.output


def test_what_cannot_work_on_the_cpu_is_refused() -> None:
    arguments = (*GPT_ARGUMENTS, "--transformer-impl", "transformer_engine")
    error = error_of(launch("--cpu", str(SCRIPT), *arguments))
    assert "--transformer-impl transformer_engine does not work on the CPU (--cpu)" in error


def raising(error: str) -> str:
    return f"from megatron_dip.errors import {error}\nraise {error}('sample 3\\nhas no image')\n"


@pytest.fixture
def run_without_megatron(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """The launcher in this process, where installing the hooks would change other tests."""
    monkeypatch.setattr(versions, "check_megatron", lambda: "0.0.0")
    monkeypatch.setattr(hooks, "enable", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(script: str, *options: str) -> None:
        path = tmp_path / "script.py"
        path.write_text(script)
        main([*options, str(path)])

    return run


@pytest.mark.parametrize("error", ["ConfigError", "DataError", "UnsupportedError", "PlanError"])
def test_an_error_in_the_input_is_one_line_and_exit_status_2(
    run_without_megatron: Callable[..., None], capsys: pytest.CaptureFixture[str], error: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_without_megatron(raising(error))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "megatron-dip: error: sample 3 has no image\n"


def test_with_dip_debug_an_error_in_the_input_keeps_its_traceback(
    run_without_megatron: Callable[..., None],
) -> None:
    with pytest.raises(DataError):
        run_without_megatron(raising("DataError"), "--dip-debug")


def test_a_failure_of_the_run_keeps_its_traceback(
    run_without_megatron: Callable[..., None],
) -> None:
    with pytest.raises(ExecutionError):
        run_without_megatron(raising("ExecutionError"))
    with pytest.raises(PlanningError):
        run_without_megatron(
            "from megatron_dip.errors import PlanningError\n"
            "raise PlanningError('no plan') from ZeroDivisionError('a bug in the planner')"
        )
    with pytest.raises(ZeroDivisionError):
        run_without_megatron("1 / 0")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("raise ChannelError('nothing came')", "nothing came"),
        (
            "try: raise ChannelError('nothing came')\n"
            "except ChannelError as e: raise ExecutionError('3F1: nothing came\\n  2F1') from e",
            "3F1: nothing came",
        ),
        ("raise PlanningError('no plan')", "no plan"),
        ("raise PlanError('no plan:\\n  1F0')", "no plan: 1F0"),
        (
            "try: raise DataError('sample 3 has no image')\n"
            "except DataError as error: raise RuntimeError('in a worker') from error",
            "sample 3 has no image",
        ),
        (
            "raise RuntimeError('[pair.cc:561] Connection closed by peer [::1]:5')",
            "rank 0 lost its connection to another rank, whose process has ended: see its log for "
            "the cause",
        ),
    ],
    ids=[
        "channel",
        "action",
        "planning",
        "plan",
        "wrapped input error",
        "collective of Megatron's",
    ],
)
def test_the_end_of_another_rank_and_wrapped_input_errors_are_one_line(
    run_without_megatron: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    expected: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_without_megatron(f"from megatron_dip.errors import *\n{script}\n")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"megatron-dip: error: {expected}\n"
