"""The experiments of the paper run in their small form and write what they found."""

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("paper_experiments")


@pytest.mark.parametrize(
    "name",
    [
        "ablation",
        "changing_load",
        "sub_microbatches",
        "memory_over_time",
        "search_progress",
        "exact_solver",
        "large_clusters",
    ],
)
def test_every_experiment_writes_numbers_a_table_and_a_picture(
    command, monkeypatch, tmp_path, name
) -> None:
    monkeypatch.setattr("sys.argv", ["paper", name, "--quick", "--output", str(tmp_path)])
    command.main()
    assert json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.md").read_text().startswith("| ")
    picture = ElementTree.fromstring((tmp_path / f"{name}.svg").read_text())
    assert picture.tag.endswith("svg")


def test_full_results_are_not_replaced_by_small_ones(command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["paper", "all", "--quick"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--output" in capsys.readouterr().err
