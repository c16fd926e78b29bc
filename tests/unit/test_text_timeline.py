"""Timelines as text: what a column shows, and that lines fit."""

import pytest
from planning_cases import chain_case

from megatron_dip.errors import ConfigError
from megatron_dip.planner import make_plan
from megatron_dip.simulator.text_timeline import text_timeline
from megatron_dip.simulator.timeline import Panel, Span, plan_panel


def panel_of(*spans: Span, num_ranks: int = 1, title: str = "drawn") -> Panel:
    return Panel(title=title, spans=spans, num_ranks=num_ranks)


def rows_of(text: str) -> list[str]:
    return [line.split()[2] for line in text.splitlines() if line.startswith("rank")]


def test_one_f_one_b_reads_as_its_picture():
    # Three microbatches on two ranks take 12 us: 24 columns are two for a microsecond.
    plan = make_plan(*chain_case(2, 3), algorithm="one_f_one_b")
    assert text_timeline([plan_panel(plan, "classic")], 41).splitlines() == [
        "classic (0.0 ms)",
        "rank 0 LLLL....llllLLllll..llll idle  25%",
        "rank 1 ..LLllllLLllllLLllll.... idle  25%",
        "",
        "       0                 0.0 ms",
        "forward/backward: L/l language, . idle; a column is 0.00 ms",
    ]


def test_a_column_shows_what_takes_most_of_it():
    # 23 columns of 100 us each: the second is half idle at most, the third has more B than F.
    spans = [
        Span(0, "vision", "0F0", 0.0, 100.0, "F"),
        Span(0, "vision", "0B0", 100.0, 140.0, "B"),
        Span(0, "language", "1F0", 200.0, 240.0, "F"),
        Span(0, "language", "1B0", 240.0, 300.0, "B"),
        Span(0, "language", "1W0", 2200.0, 2300.0, "W"),
    ]
    assert rows_of(text_timeline([panel_of(*spans)], 40)) == ["V.l" + "." * 19 + "l"]


def test_waiting_is_idle_and_other_work_is_marked():
    spans = [
        Span(0, "vision", "0RECV_F0<1", 0.0, 1100.0, "wait"),
        Span(0, "vision", "reduce", 1100.0, 2300.0, "other"),
    ]
    text = text_timeline([panel_of(*spans)], 40)
    assert rows_of(text) == ["." * 11 + "+" * 12]
    assert "+ other" in text


def test_modules_that_begin_alike_have_letters_of_their_own():
    spans = [
        Span(0, name, f"{stage}F0", 0.0, 1.0, "F")
        for stage, name in enumerate(("vision", "video", "v"))
    ]
    text = text_timeline([panel_of(*spans)], 60)
    assert "V/v vision, I/i video, A/a v" in text
    many = [Span(0, f"module {index}", "0F0", 0.0, 1.0, "F") for index in range(27)]
    with pytest.raises(ConfigError, match="27 modules, but 26 letters"):
        text_timeline([panel_of(*many)], 60)


def test_panels_share_one_time_axis_and_lines_fit():
    short = panel_of(Span(0, "dit", "0F0", 0.0, 5.0, "F"), title="short")
    long = panel_of(
        Span(0, "dit", "0F0", 0.0, 10.0, "F"), Span(15, "dit", "1F0", 0.0, 10.0, "F"), num_ranks=16
    )
    text = text_timeline([short, long], 80)
    assert max(map(len, text.splitlines())) <= 80
    lengths = [len(row) for row in rows_of(text)]
    assert lengths[0] * 2 == lengths[1] == lengths[-1]
    assert len(lengths) == 17


def test_nothing_at_all_is_drawn_as_such():
    assert "rank 0" in text_timeline([panel_of()], 50)


def test_a_width_that_shows_nothing_is_refused():
    with pytest.raises(ConfigError, match="20 columns"):
        text_timeline([panel_of()], 20)
