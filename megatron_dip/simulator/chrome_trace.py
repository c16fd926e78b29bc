"""Schedules in Chrome's trace event format, for Perfetto and other trace viewers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dip.simulator.timeline import Panel

__all__ = ["write_chrome_trace"]


def write_chrome_trace(path: str | Path, panels: Sequence[Panel]) -> None:
    """Write ``panels`` as processes and their ranks as threads; times are in microseconds."""
    events: list[dict[str, Any]] = []
    for process, panel in enumerate(panels):
        events.append(
            {"ph": "M", "name": "process_name", "pid": process, "args": {"name": panel.title}}
        )
        for rank in range(panel.num_ranks):
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": process,
                    "tid": rank,
                    "args": {"name": f"rank {rank}"},
                }
            )
        events.extend(
            {
                "ph": "X",
                "name": span.action,
                "cat": f"{span.module},{span.kind}",
                "pid": process,
                "tid": span.rank,
                "ts": span.start_us,
                "dur": span.end_us - span.start_us,
                "args": {"module": span.module},
            }
            for span in panel.spans
        )
    Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
