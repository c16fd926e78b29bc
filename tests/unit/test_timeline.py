"""Timelines: what the page and the picture are told."""

import json
import re
from xml.etree import ElementTree

import pytest
from planning_cases import chain_case, encoder_case

from megatron_dip.planner import make_plan
from megatron_dip.simulator.chrome_trace import write_chrome_trace
from megatron_dip.simulator.picture import write_picture
from megatron_dip.simulator.timeline import (
    Panel,
    Span,
    idle_fractions,
    module_colours,
    plan_panel,
    write_timeline,
)


@pytest.fixture
def panels() -> list[Panel]:
    measured = Panel(
        title="measured </script>",
        num_ranks=2,
        spans=[
            Span(0, "vision", "0F0", 0.0, 30.0, "F"),
            Span(0, "vision", "0RECV_B0<1", 30.0, 90.0, "wait"),
            Span(1, "language", "3F0", 50.0, 100.0, "F"),
        ],
    )
    return [plan_panel(make_plan(*encoder_case()), "predicted"), measured]


def test_waiting_counts_as_idle(panels):
    assert idle_fractions(panels[1]) == (0.7, 0.5)


def test_the_page_is_self_contained_and_holds_every_span(panels, tmp_path):
    path = tmp_path / "timeline.html"
    write_timeline(path, "batch <3>", panels)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://", page)
    assert "<title>batch &lt;3&gt;</title>" in page
    text = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    data = json.loads(text)
    assert data["modules"] == ["vision", "language"]
    assert data["panels"][1]["title"] == "measured </script>"
    assert data["panels"][1]["rows"][0][1] == [30.0, 90.0, 0, 5, "0RECV_B0<1"]
    assert sum(map(len, data["panels"][0]["rows"])) == len(panels[0].spans)
    assert data["panels"][0]["idle"] == list(idle_fractions(panels[0]))


def test_memory_curve_rises_with_forwards_and_falls_with_backwards():
    panel = plan_panel(make_plan(*chain_case(1, 1, layer_static_bytes=5)), "chain")
    assert panel.memory == {0: [(0.0, 5), (0.0, 15), (3.0, 5)]}


def test_memory_curve_peaks_at_the_estimate():
    plan = make_plan(*encoder_case(), split_backward=True)
    panel = plan_panel(plan, "split")
    peaks = tuple(max(held for _, held in panel.memory[rank]) for rank in range(2))
    assert peaks == plan.estimate.peak_bytes


def test_every_module_has_its_own_colour(panels):
    colours = module_colours(panels)
    assert list(colours) == ["vision", "language"]
    assert len(set(colours.values())) == 2


def test_colours_depend_neither_on_the_batch_nor_on_what_else_is_shown():
    def panel(*spans: tuple[str, str]) -> Panel:
        made = [Span(0, name, text, float(n), n + 1.0, "F") for n, (name, text) in enumerate(spans)]
        return Panel(title="", spans=made, num_ranks=1)

    text_first = panel(("language", "2F0"), ("vision", "0F1"), ("vision", "1F1"))
    with_data = panel(("loading data", "data"), ("vision", "1F0"), ("language", "2F0"))
    assert list(module_colours([text_first])) == ["vision", "language"]
    mixed = panel(("language", "0F0"), ("vision", "0F0"))
    assert list(module_colours([with_data, mixed])) == ["vision", "language", "loading data"]


def test_the_picture_is_xml_with_a_row_per_rank(panels, tmp_path):
    path = tmp_path / "schedule.svg"
    write_picture(path, panels)
    texts = [node.text for node in ElementTree.parse(path).iter() if node.tag.endswith("text")]
    assert texts.count("rank 1") == 2
    assert "vision backward" in texts


def test_the_trace_has_one_event_per_span(panels, tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(path, panels)
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == sum(len(panel.spans) for panel in panels)
    assert spans[-1]["dur"] == 50.0
