"""Gathering facts of this machine, and judging them."""

from concurrent.futures import ThreadPoolExecutor

from megatron_dip.doctor.asking import ask_python
from megatron_dip.doctor.device_rows import device_rows
from megatron_dip.doctor.environment_rows import environment_rows
from megatron_dip.doctor.facts import Facts, Run
from megatron_dip.doctor.machine import ask_gpus, ask_topology, describe_machine
from megatron_dip.doctor.machine_rows import machine_rows
from megatron_dip.doctor.probes import PROBES
from megatron_dip.doctor.rows import Row
from megatron_dip.doctor.software_rows import software_rows

__all__ = ["examine", "gather"]


def gather(run: Run, limit_seconds: float) -> Facts:
    """Ask this machine; no question takes longer than ``limit_seconds``."""
    with ThreadPoolExecutor(max_workers=len(PROBES)) as pool:
        asked = {name: pool.submit(ask_python, name, limit_seconds) for name in PROBES}
        gpus, failure = ask_gpus(limit_seconds)
        topology = ask_topology(limit_seconds) if len(gpus) > 1 else None
        answers = {name: answer.result() for name, answer in asked.items()}
    return Facts(
        run=run,
        machine=describe_machine(),
        gpus=gpus,
        gpu_failure=failure,
        topology=topology,
        **answers,
    )


def examine(facts: Facts) -> list[Row]:
    """All rows, in one order."""
    return [
        *software_rows(facts),
        *device_rows(facts),
        *machine_rows(facts),
        *environment_rows(facts),
    ]
