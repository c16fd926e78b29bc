"""Options of a run of the example: Megatron's own placement of layers, and traces of schedules."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from failing_runs import run_vlm
from tiny_vlm import make_tiny_data, write_config

from megatron_dip.report import read_records, read_traces, write_report
from megatron_dip.report.traces import plan_of_trace

NUM_MICROBATCHES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training-options")
    make_tiny_data(folder / "data")
    write_config(folder / "config.yaml", folder / "data", num_ranks=2)
    return folder


class Run(NamedTuple):
    """``losses`` as logged, and the number of parameters on each rank."""

    losses: list[float]
    num_parameters: list[int]


def train(
    folder: Path,
    name: str,
    *arguments: str,
    trace_folder: Path | None = None,
    config: Path | None = None,
) -> Run:
    """Two iterations on two ranks; traces are in ``trace_folder``, ``folder / name`` if none."""
    path = config or folder / "config.yaml"
    flags = ("--pipeline-model-parallel-size", "2", "--dip-config", str(path))
    batch = ("--global-batch-size", str(NUM_MICROBATCHES), "--calculate-per-token-loss")
    trace = ("--dip-trace-dir", str(trace_folder or folder / name))
    ranks = run_vlm(folder / f"run-{name}", 2, *flags, *batch, *trace, *arguments)
    for rank in ranks:
        assert rank.returncode == 0, rank.output[-4000:]
    if trace_folder is not None:
        for rank in ranks:
            assert rank.output.count(f"nothing can be recorded in {trace_folder} (") == 1
    losses = re.findall(r"iteration +\d+/.*lm loss: (\S+)", ranks[-1].output)
    assert len(losses) == 2
    parameters = [re.search(r"number of parameters .*: (\d+)", rank.output) for rank in ranks]
    return Run([float(loss) for loss in losses], [int(found[1]) for found in parameters if found])


@pytest.fixture(scope="module")
def stock(folder: Path) -> Run:
    return train(folder, "stock")


def test_megatrons_own_schedule_keeps_its_own_placement_of_layers(folder: Path, stock: Run) -> None:
    """Two of eight language layers on the first rank give the same model as four.

    A file in the place of the folder for traces is no reason to stop.
    """
    layers = ("--decoder-first-pipeline-num-layers", "2")
    uneven = train(folder, "uneven", *layers, trace_folder=folder / "config.yaml")
    assert uneven.losses == pytest.approx(stock.losses, rel=1e-4)
    assert sum(uneven.num_parameters) == sum(stock.num_parameters)
    assert uneven.num_parameters[0] < stock.num_parameters[0]


@pytest.fixture(scope="module")
def planned(folder: Path) -> Run:
    return train(folder, "dip", "--dip-schedule")


def test_every_step_is_recorded_with_the_memory_that_its_plan_foresaw(
    folder: Path, planned: Run, tmp_path: Path
) -> None:
    records = read_records(folder / "dip")
    assert [record.iteration for record in records] == [1, 2]
    for record in records:
        assert record.step_us > record.measured_us > 0.0
        assert record.predicted_us > 0.0 and record.num_microbatches == NUM_MICROBATCHES
        for rank in record.ranks:
            assert 0.0 < rank.busy_us <= record.measured_us
            # Bytes that autograd holds, against the cost model's: tokens differ, bytes do not.
            assert rank.stored_bytes == pytest.approx(rank.predicted_bytes, rel=0.02)
    page = tmp_path / "report.html"
    assert write_report(folder / "dip", page) == 2
    assert '"iterations":[1,2]' in page.read_text()
    assert page.read_text().count('"title":"measured"') == 2


def test_activations_go_to_the_host_where_memory_is_short(folder: Path, planned: Run) -> None:
    """Losses are the same; measured memory keeps to what was planned, below the limit."""
    ranks = [rank for record in read_records(folder / "dip") for rank in record.ranks]
    limit = max(rank.static_bytes + 0.7 * rank.predicted_bytes for rank in ranks)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["schedule"]["memory_limit_gib"] = limit / 2**30
    config["schedule"]["offload"] = {"link_gb_per_s": 1000.0, "host_memory_gib": 1.0}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(config))
    # A machine that plans with offloads for the first time compiles for a while.
    waits = ("--dip-timeout-seconds", "200")
    away = train(folder, "away", "--dip-schedule", *waits, config=path)
    assert away.losses == pytest.approx(planned.losses, rel=1e-6)
    traces = read_traces(folder / "away")
    for trace, record in zip(traces, read_records(folder / "away"), strict=True):
        plan = plan_of_trace(folder / "away", trace)
        assert plan.offload, "nothing was offloaded"
        meant = [[str(a) for a in line if a.type.is_copy] for line in plan.actions]
        done = [[span.label for span in rank.spans if span.is_copy] for rank in trace.ranks]
        assert list(map(sorted, done)) == list(map(sorted, meant))
        for rank in record.ranks:
            assert rank.stored_bytes == pytest.approx(rank.predicted_bytes, rel=0.04)
            assert rank.static_bytes + rank.stored_bytes <= 1.02 * limit
    assert write_report(folder / "away", folder / "away.html") == 2


def test_both_schedules_write_traces_of_all_their_actions(
    folder: Path, stock: Run, planned: Run
) -> None:
    for name in ("stock", "dip"):
        traces = read_traces(folder / name)
        assert [(trace.schedule, trace.iteration) for trace in traces] == [(name, 1), (name, 2)]
        for trace in traces:
            assert len(trace.ranks) == 2
            assert all(0.0 <= idle <= 1.0 for idle in trace.idle_fractions), trace.idle_fractions
    for rank in read_traces(folder / "stock")[0].ranks:
        expected = {f"{rank.rank}{kind}{m}" for kind in "FB" for m in range(NUM_MICROBATCHES)}
        assert {span.label for span in rank.spans} == expected
    for rank in read_traces(folder / "dip")[0].ranks:
        labels = [span.label for span in rank.spans if not span.is_wait]
        counts = Counter(match[0] for text in labels if (match := re.search("[FB]", text)))
        # The language stage computes every microbatch, the vision stage those with images.
        assert NUM_MICROBATCHES < counts["F"] == counts["B"] <= 2 * NUM_MICROBATCHES
        assert len(set(labels)) == len(labels)
