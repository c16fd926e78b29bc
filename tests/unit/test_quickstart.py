"""The quickstart's table and timeline, where timelines are there of some iterations only."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from planning_cases import encoder_case
from rich.console import Console

from megatron_dip.plan import save_plan
from megatron_dip.planner import make_plan
from megatron_dip.report import IterationTrace, LocalRun, RankTrace, Span

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"
NUM_ITERATIONS = 50
TRACED = (*range(1, 21), 40)


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trace_of(schedule: str, iteration: int) -> IterationTrace:
    """Two ranks, busy for half of an iteration that is longer the later it comes."""
    length = 1000.0 + iteration
    spans = (Span("0F0", 0.0, length / 2, False),)
    ranks = tuple(RankTrace(rank=r, start_us=0.0, end_us=length, spans=spans) for r in (0, 1))
    return IterationTrace(schedule=schedule, iteration=iteration, ranks=ranks)


def outcomes_of(quickstart: ModuleType, elapsed_ms: tuple[float, float]) -> list[object]:
    return [
        quickstart.Outcome(
            name=name,
            run=LocalRun(
                losses=tuple(9.0 - 0.1 * number for number in range(NUM_ITERATIONS)),
                elapsed_ms=(one,) * NUM_ITERATIONS,
            ),
            traces=[trace_of(name, iteration) for iteration in TRACED],
        )
        for name, one in zip(("stock", "plans"), elapsed_ms, strict=True)
    ]


def test_the_table_counts_iterations_without_a_timeline(quickstart: ModuleType) -> None:
    # Iterations without a timeline have ten times as many tokens: the median tells who counts.
    tokens = {number: 100 if number in TRACED else 1000 for number in range(1, NUM_ITERATIONS + 1)}
    table = quickstart.comparison(outcomes_of(quickstart, (1000.0, 500.0)), tokens)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    stock, plans = (line for line in console.export_text().splitlines() if "9.000" in line)
    assert "1,000" in stock and "1.00x" in stock and stock.count("50.0%") == 2
    assert "2,000" in plans and "2.00x" in plans and "4.100" in plans


def test_speeds_are_compared_batch_by_batch(quickstart: ModuleType) -> None:
    """However long batches are; the first iterations, which warm caches up, do not count."""
    first, second = outcomes_of(quickstart, (1.0, 1.0))
    lengths = [10.0 * number for number in range(1, NUM_ITERATIONS + 1)]
    # The lesser ratio is that of most batches; with the first four it would be that of fewer.
    ratios = [*[9.0] * 4, *(1.25, 1.5) * 22, 1.25, 1.25]
    own = [length / ratio for length, ratio in zip(lengths, ratios, strict=True)]
    first = replace(first, run=replace(first.run, elapsed_ms=tuple(lengths)))
    second = replace(second, run=replace(second.run, elapsed_ms=tuple(own)))
    assert quickstart.relative_speed(second, first) == pytest.approx(1.25)
    assert quickstart.relative_speed(first, first) == 1.0


def test_the_timeline_is_of_an_iteration_that_both_have_and_that_has_a_plan(
    quickstart: ModuleType, tmp_path: Path
) -> None:
    stock, plans = outcomes_of(quickstart, (1000.0, 500.0))
    stock.traces[:] = [one for one in stock.traces if one.iteration in (1, 2, 17, 19, 40)]
    (tmp_path / "trace").mkdir()
    # The middle one of 17, 19, 40; no other plan is asked for.
    save_plan(make_plan(*encoder_case()), tmp_path / "trace" / "plan-replica0-000019.json")
    page = tmp_path / "timeline.html"
    quickstart.draw(page, [stock, plans], tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "iteration 19 of the quickstart" in text
    for title in ("predicted", "measured", "Megatron 1F1B, measured"):
        assert json.dumps(title)[1:-1] in text
