"""The benchmark over replicas: what was measured is kept, and drawn."""

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("replicas")


def rows_of(command, monkeypatch, path: Path, *options: str) -> list[dict]:
    monkeypatch.setattr("sys.argv", ["replicas", "-o", str(path), "t2v_s", *options])
    command.main()
    return json.loads(path.read_text())["rows"]


def test_a_second_run_measures_only_what_is_missing(command, monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "results.json"
    options = ("--replicas", "2", "--evaluations", "2")
    first = rows_of(command, monkeypatch, path, *options)
    assert len(first) == 10
    for row in first:
        assert row["slowest_us"] == max(row["times_us"])
        assert 0 < row["utilisation"] < 1

    path.write_text(json.dumps({"rows": first[:-2]}))
    capsys.readouterr()
    assert rows_of(command, monkeypatch, path, *options) == first
    assert capsys.readouterr().out.count("whole microbatches") == 2

    more = rows_of(command, monkeypatch, path, *options[:2], "--evaluations", "3")
    assert len(more) == 10
    assert capsys.readouterr().out.count("planned") == 6

    monkeypatch.setattr(command, "PICTURE", tmp_path / "replicas.svg")
    monkeypatch.setattr("sys.argv", ["replicas", "--draw", str(path)])
    command.main()
    assert "| T2V-S | 80 GB | 2 | 0." in capsys.readouterr().out
    assert ElementTree.fromstring((tmp_path / "replicas.svg").read_text()).tag.endswith("svg")


def test_assignment_keeps_every_sample_and_evens_replicas_out(command) -> None:
    given = command.Batches.draw(ROOT, "t2v_s", "h100_16_half_peak", range(3), num_microbatches=8)
    assigned = given.assigned(within=True)
    assert assigned.work_us.sum() == pytest.approx(given.work_us.sum())
    assert np.ptp(assigned.work_us) < np.ptp(given.work_us)
    tokens = [
        sorted(
            item.tokens
            for replica in range(3)
            for content in batches.contents(replica)
            for item in content["dit"]
        )
        for batches in (given, assigned)
    ]
    assert tokens[0] == tokens[1]
