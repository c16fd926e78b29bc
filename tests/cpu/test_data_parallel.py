"""Data-parallel replicas with different plans: one order of reductions, the mean of gradients."""

from runtime_suites import run_suite


def test_replicas_with_different_plans_get_the_mean_of_their_gradients() -> None:
    """Two pipelines of two ranks; one has images, the other text only."""
    (reports,) = run_suite("replicas", 4).values()
    results = []
    for report in reports:
        assert report is not None and report.outcome == "ok", report
        results.append(report.result)
    for images, text in zip(results[:2], results[2:], strict=True):
        assert images["actions"] != text["actions"]
        assert images["reduces"] == text["reduces"] and len(text["reduces"]) == 3
        # As early as the order allows: not all of them at the end.
        assert "REDUCE_GRAD" in " ".join(images["actions"][:-3])
    assert max(result["worst"] for result in results) <= 1e-12
