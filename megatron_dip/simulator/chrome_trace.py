"""Schedules in Chrome's trace event format, for Perfetto and other trace viewers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dip.plan.actions import Action, ActionType
from megatron_dip.simulator.timeline import Panel, Span

__all__ = ["write_chrome_trace"]


def write_chrome_trace(path: str | Path, panels: Sequence[Panel]) -> None:
    """Write ``panels`` as processes and their ranks as threads; times are in microseconds.

    Copies to and from the host have threads of their own, because others run beside them.
    """
    events: list[dict[str, Any]] = []
    for process, panel in enumerate(panels):
        events.append(
            {"ph": "M", "name": "process_name", "pid": process, "args": {"name": panel.title}}
        )
        threads = {(rank, ""): f"rank {rank}" for rank in range(panel.num_ranks)}
        for span in panel.spans:
            if span.kind == "copy":
                threads.setdefault(_thread(span), f"rank {span.rank}, {_thread(span)[1]}")
        numbers = {thread: number for number, thread in enumerate(threads)}
        events.extend(
            {
                "ph": "M",
                "name": "thread_name",
                "pid": process,
                "tid": numbers[thread],
                "args": {"name": name},
            }
            for thread, name in threads.items()
        )
        events.extend(
            {
                "ph": "X",
                "name": span.action,
                "cat": f"{span.module},{span.kind}",
                "pid": process,
                "tid": numbers[_thread(span)],
                "ts": span.start_us,
                "dur": span.end_us - span.start_us,
                "args": {"module": span.module},
            }
            for span in panel.spans
        )
    Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


def _thread(span: Span) -> tuple[int, str]:
    if span.kind != "copy":
        return span.rank, ""
    is_reload = Action.parse(span.action).type is ActionType.RELOAD
    return span.rank, "from the host" if is_reload else "to the host"
