"""``megatron-dip simulate``: plans and baselines side by side, as a table and as timelines."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_dip.cli.comparison import Row, print_rows
from megatron_dip.cli.output import write_file
from megatron_dip.errors import ConfigError
from megatron_dip.plan.plan import Plan, load_plan
from megatron_dip.plan.validation import validate_plan
from megatron_dip.planner.baselines import BaselineCase, StaticCuts, baselines, find_baseline
from megatron_dip.simulator.chrome_trace import write_chrome_trace
from megatron_dip.simulator.picture import write_picture
from megatron_dip.simulator.simulate import simulate
from megatron_dip.simulator.text_timeline import MIN_WIDTH, text_timeline
from megatron_dip.simulator.timeline import Panel, plan_panel, write_timeline
from megatron_dip.workload import Problem, load_problem

__all__ = ["simulate_plans"]

# Of a text timeline that goes to a file.
_FILE_WIDTH = 160


def simulate_plans(
    plans: Annotated[list[Path], typer.Argument(help="Plan files.")],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Also show this baseline for the batch of every plan; may be repeated. One of: "
            + ", ".join(known.name for known in baselines())
        ),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            help="Batch problem (JSON) to fit the static cuts of baselines on; may be repeated. "
            "Without one, cuts are fitted on the plan's own batch, in the baselines' favour."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Timeline (HTML, needs no network).")] = None,
    svg: Annotated[Path | None, typer.Option(help="Still picture (SVG).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Chrome trace (JSON).")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the timeline as text.")] = False,
    text_file: Annotated[Path | None, typer.Option(help="Timeline as text, to a file.")] = None,
) -> None:
    """Compare plans and baselines: time, ratio to the lower bound, utilisation, idle, memory."""
    names = list(dict.fromkeys(baseline or ()))
    known = [find_baseline(name) for name in names]
    if fit and all(baseline.runs_on_stages for baseline in known):
        raise ConfigError(
            "--fit without --baseline of a static cut (expected a baseline to fit the cuts of; "
            "others run on the stages of the plan)"
        )
    samples = [load_problem(path) for path in fit or ()]
    rows, panels = [], []
    loaded = [(path.stem, load_plan(path)) for path in plans]
    for name, plan in loaded:
        validate_plan(plan)
        simulation = simulate(plan)
        rows.append(Row.of_plan(name, plan, simulation))
        panels.append(plan_panel(plan, name, simulation))
    for row, panel in _run_baselines(names, loaded, samples):
        rows.append(row)
        panels.append(panel)
    print_rows(rows)
    if text:
        width = max(MIN_WIDTH, shutil.get_terminal_size((_FILE_WIDTH, 0)).columns)
        typer.echo(text_timeline(panels, width), nl=False)
    title = ", ".join(row.name for row in rows)
    if html is not None:
        write_file(html, lambda: write_timeline(html, title, panels))
    if svg is not None:
        write_file(svg, lambda: write_picture(svg, panels))
    if trace is not None:
        write_file(trace, lambda: write_chrome_trace(trace, panels))
    if text_file is not None:
        drawn = text_timeline(panels, _FILE_WIDTH)
        write_file(text_file, lambda: text_file.write_text(drawn, encoding="utf-8"))


def _run_baselines(
    names: Sequence[str], plans: Sequence[tuple[str, Plan]], samples: Sequence[Problem]
) -> list[tuple[Row, Panel]]:
    """Every baseline for every plan; static ones once for plans of the same batch."""
    found: dict[tuple[str, ...], tuple[Row, Panel]] = {}
    cuts = StaticCuts(samples) if samples else None
    num_batches = len({plan.problem.digest() for _, plan in plans})
    for plan_name, plan in plans if names else ():
        case = BaselineCase.of_plan(plan, cuts or StaticCuts([plan.problem]))
        for name in names:
            known = find_baseline(name)
            key = (name, plan_name if known.runs_on_stages else plan.problem.digest())
            if key not in found:
                is_alone = num_batches == 1 and (len(plans) == 1 or not known.runs_on_stages)
                result = known.run(case)
                row = Row.of_baseline(name if is_alone else f"{name} for {plan_name}", result)
                found[key] = row, result.panel(f"{row.name}: {known.summary}")
    return list(found.values())
