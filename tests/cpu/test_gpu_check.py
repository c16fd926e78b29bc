"""The parts of ``scripts/gpu_check.sh``, small and on CPUs; the script itself where no GPU is."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY

FOLDER = REPOSITORY / "scripts" / "gpu_check"
LIMIT = ("--limit-seconds", "240")
"""For a machine that is busy; the script's own limits are for one that is not."""
SCRIPT = REPOSITORY / "scripts" / "gpu_check.sh"
RunPart = Callable[..., dict[str, Any]]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def run_part(
    parts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> RunPart:
    """Runs a part in this process, which has imported torch; the part's ranks are scripts."""
    results = tmp_path / "r.jsonl"

    def run(name: str, *arguments: str) -> dict[str, Any]:
        """The line that it adds to the results."""
        given = [f"{name}.py", "--device", "cpu", *arguments, "--results", str(results)]
        monkeypatch.setattr(sys, "argv", given)
        importlib.import_module(name).main()
        line: dict[str, Any] = json.loads(results.read_text().splitlines()[-1])
        assert line["device"] == "cpu" and f"{line['part']} (cpu):" in capsys.readouterr().out
        return line["found"]

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked_and_nothing_written(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert "no GPU here, and nothing was checked" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["results", "more"]])
def test_an_option_is_not_taken_for_a_folder(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert f"{' '.join(arguments)}: expected at most the folder for results" in done.stderr


def test_limits_of_all_parts_are_twelve_minutes_and_every_part_has_one() -> None:
    text = SCRIPT.read_text()
    parts = dict(re.findall(r"(\w+):(\d+)", text[text.index("parts=(") : text.index("fail()")]))
    assert sum(map(int, parts.values())) <= 720
    runs = {path.stem for path in FOLDER.glob("*.py") if "part_arguments(__doc__" in read(path)}
    assert set(parts) == runs


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_versions_and_ranks_that_meet(run_part: RunPart) -> None:
    found = run_part("machine_versions", *LIMIT)
    assert found["torch"] == torch.__version__ and "gpu" not in found
    assert found["two ranks on one device"]["allowed"] is True


def test_queues_are_not_asked_for_on_cpus(run_part: RunPart) -> None:
    found = run_part("hardware_queues")
    assert found == {"not run": "there are no hardware queues"}


def test_ways_to_copy_bring_the_same_numbers(parts: None) -> None:
    copies = importlib.import_module("host_copies")
    ways = copies.ways(torch.device("cpu"))
    lists = [way() for name, way in ways.items() if "list" in name or "numbers" in name]
    assert len(lists) == 3 and all(torch.equal(lists[0], other) for other in lists)
    assert ways["item()"]() == 0.0


def test_activations_move_and_come_back(parts: None) -> None:
    found = importlib.import_module("offloading").measured(torch.device("cpu"))
    assert found["equal gradients"] and not found["host waited"]
    # Rows, what the norm gives and what is between the linear layers, twice.
    assert found["bytes moved"] > 4 * (64 * 32 * 10) * 4
    assert set(found["GB/s"]) == {"to the host", "back"}


def test_layers_are_timed_and_not_compared_with_a_gpu(run_part: RunPart) -> None:
    found = run_part("layer_times")
    timed = {name: value for name, value in found.items() if "tokens" in name}
    assert len(timed) == 4
    assert all(set(value) == {"forward us", "backward us"} for value in timed.values())
    layers = importlib.import_module("layer_times")
    model = layers.load_model(REPOSITORY / "configs" / "models" / "vlm_s.yaml")
    with torch.device("meta"):
        sizes = {
            shape.name: sum(
                module.weight.numel()
                for module in layers.Layer(shape, 1).modules()
                if isinstance(module, torch.nn.Linear)
            )
            for shape in model.modules
        }
    assert sizes == {shape.name: shape.layer_linear_parameters() for shape in model.modules}


def test_a_late_peer_is_waited_for_by_nobody_over_gloo(run_part: RunPart) -> None:
    found = run_part("late_peer", *LIMIT)
    assert found["backend"] == "gloo"
    calls = ["isend, first", "isend, again", "irecv, first", "irecv, again"]
    assert [name for name in found if "," in name] == calls


def test_the_executor_in_the_plans_own_order_equals_a_plain_loop(run_part: RunPart) -> None:
    """``test_executor.py`` has the other two."""
    found = run_part("executor_orders", "--orders", "plan", *LIMIT)
    assert set(found) == {"backend", "plan"}
    assert found["plan"].get("largest relative error", 1.0) <= 1e-12, found


def test_steps_of_a_tiny_model_are_watched(run_part: RunPart) -> None:
    found = run_part("training_syncs", "--models", "vlm", *LIMIT)
    assert found["vlm"]["steps"] == 5, found
    assert found["vlm"]["steps watched"] == 0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [({}, "gloo"), ({"two ranks on one device": {"allowed": True}}, "nccl")],
)
def test_ranks_share_a_gpu_over_nccl_only_where_it_allows_that(
    parts: None, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], expected: str
) -> None:
    orders = importlib.import_module("executor_orders")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert orders._backend("cuda", answers) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert orders._backend("cuda", {}) == "nccl"
    assert orders._backend("cpu", answers) == "gloo"


def test_a_delay_is_judged_by_the_time_that_others_wait(parts: None) -> None:
    queues = importlib.import_module("hardware_queues")
    assert queues.is_held_up(0.031, 0.03) and not queues.is_held_up(0.0004, 0.03)
    assert queues.first_true(lambda number: number >= 7, (1, 2, 8)) == 8
    assert queues.first_true(lambda number: False, (1, 2)) is None


def test_a_rank_that_failed_says_how(parts: None) -> None:
    results = importlib.import_module("check_results")
    failed = results.CompletedRank(returncode=1, output="a\nb\nRuntimeError: no NCCL\n")
    assert results.answers_of(failed) == {"failed": "ended with 1: a | b | RuntimeError: no NCCL"}
    late = results.CompletedRank(returncode=-9, output="", timed_out=True)
    assert results.answers_of(late)["failed"].startswith("ended by its time limit")
