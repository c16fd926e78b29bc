"""Runs that have less memory than they keep activations, beside ones with room for all.

A run with room tells what is kept; the configuration of the other one states a limit far below
that, and a link to the host over which all of it may go.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_dip.report import read_records, read_traces
from megatron_dip.report.traces import plan_of_trace

__all__ = ["assert_moved", "write_short", "write_steady"]

# Of what activations take with room for all: so little that waiting for memory takes longer.
_SHARE = 0.5


# However busy the machine is, so that plans depend on the data alone.
_PATIENT = {"wait_limit_ms": 200_000.0, "search_limit_ms": 200_000.0}


def write_steady(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` at ``path``, and returned, changed so that its plans are the same in every run."""
    schedule = config.get("schedule", {})
    schedule = schedule | {"costs": schedule.get("costs", {}) | {"feedback": False}}
    steady = config | {"schedule": schedule, "planning": config.get("planning", {}) | _PATIENT}
    path.write_text(yaml.safe_dump(steady))
    return steady


def write_short(path: Path, config: dict[str, Any], roomy: Path) -> None:
    """``config`` with a limit and a link, at ``path``.

    Args:
        config: As in a configuration file.
        roomy: What the run with room has written to ``--dip-trace-dir``.
    """
    ranks = [rank for record in read_records(roomy) for rank in record.ranks]
    limit = max(rank.static_bytes + _SHARE * rank.stored_bytes for rank in ranks)
    schedule = config.get("schedule", {}) | {
        "memory_limit_gib": limit / 2**30,
        "offload": {"link_gb_per_s": 1000.0, "host_memory_gib": 1.0},
    }
    path.write_text(yaml.safe_dump(config | {"schedule": schedule}))


def assert_moved(short: Path, roomy: Path) -> None:
    """Every plan offloads, and all of its copies ran; ranks were seen to hold less at once, tensor
    by tensor, than with room for all.

    Args:
        short: What the run with little memory has written to ``--dip-trace-dir``.
        roomy: The same of the run with room.
    """
    for trace in read_traces(short):
        plan = plan_of_trace(short, trace)
        assert plan.offload, f"nothing was offloaded: {plan.estimate}"
        meant = [[str(a) for a in line if a.type.is_copy] for line in plan.actions]
        done = [[span.label for span in rank.spans if span.is_copy] for rank in trace.ranks]
        assert list(map(sorted, done)) == list(map(sorted, meant))
    held, without = _most_held(short), _most_held(roomy)
    assert held < without, f"{held} bytes were held at once, with room for all {without}"


def _most_held(folder: Path) -> int:
    return max(rank.stored_bytes for record in read_records(folder) for rank in record.ranks)
