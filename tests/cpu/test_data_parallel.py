"""Data-parallel replicas with different plans: one order of reductions, the mean of gradients."""

from typing import Any

import pytest
from runtime_suites import CaseReport, run_suite


@pytest.fixture(scope="module")
def cases() -> dict[str, list[CaseReport | None]]:
    """Two pipelines of two ranks; one has images, the other text only."""
    return run_suite("replicas", 4)


def results_of(reports: list[CaseReport | None]) -> list[dict[str, Any]]:
    results = []
    for report in reports:
        assert report is not None and report.outcome == "ok", report
        results.append(report.result)
    return results


@pytest.mark.parametrize("case", ["replicas", "replicas, one queue"])
def test_replicas_with_different_plans_get_the_mean_of_their_gradients(
    cases: dict[str, list[CaseReport | None]], case: str
) -> None:
    results = results_of(cases[case])
    for images, text in zip(results[:2], results[2:], strict=True):
        assert images["actions"] != text["actions"]
        assert images["reduces"] == text["reduces"] and len(text["reduces"]) == 3
        # As early as the order allows: not all of them at the end.
        assert "REDUCE_GRAD" in " ".join(images["actions"][:-3])
        assert [stage for stage, _ in images["started"]] == [stage for stage, _ in text["started"]]
    assert max(result["worst"] for result in results) <= 1e-12


def test_with_one_queue_a_reduction_is_asked_whether_it_has_ended_before_the_next_one_starts(
    cases: dict[str, list[CaseReport | None]],
) -> None:
    """And with many nobody asks: all start at once."""
    for many in results_of(cases["replicas"]):
        assert many["asked"] == [0, 0, 0]
    for one in results_of(cases["replicas, one queue"]):
        assert one["asked"][0] > 0
