"""Runs of the example scripts on tiny models, with losses and norms at full precision."""

import json
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from launching import REPOSITORY, free_port

__all__ = ["TrainingRun", "train"]

SCRIPT = REPOSITORY / "examples" / "pretrain_vlm.py"
_COMMON = tuple(
    shlex.split("""
    --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0 --num-workers 0
    --eval-interval 1000 --log-interval 1 --ckpt-format torch_dist --dip-timeout-seconds 60
    --distributed-timeout-minutes 2 --make-vocab-size-divisible-by 1
    """)
)
_TIMEOUT_SECONDS = 150.0
# What the other ranks get to print their own error once one has failed.
_GRACE_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What one run did: per iteration the loss and the gradient norm, each in full precision."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    validation_losses: tuple[float, ...]
    """One per evaluation."""
    gradients: dict[str, tuple[float, float]]
    """Of the last iteration, by global name: the norm, and the sum with a weight per element."""
    num_early_reductions: tuple[int, ...]
    """Per rank, reductions of a chunk's gradients started before gradients were finalized."""
    seconds: float
    log: str
    """Of the last rank."""
    owner_log: str
    """Of the first rank, which plans."""


def train(folder: Path, num_ranks: int, *arguments: str, script: Path = SCRIPT) -> TrainingRun:
    """Run ``script`` on ``num_ranks`` processes; ``folder`` takes logs and must be new.

    Raises:
        AssertionError: A rank failed or did not end in time; shows the end of its log.
    """
    folder.mkdir(parents=True)
    start = time.monotonic()
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    records = [folder / f"rank{rank}.json" for rank in range(num_ranks)]
    environment = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_process"])
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [str(script), *_COMMON, *arguments]
            args = (own, command, str(logs[rank]), str(records[rank]))
            processes.append(context.Process(target=_run_rank, args=args))
            processes[-1].start()
        _wait(processes)
    finally:
        for process in processes:
            _end(process)
    for rank, process in enumerate(processes):
        text = logs[rank].read_text(errors="replace") if logs[rank].exists() else "no log"
        assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}:\n{text[-4000:]}"
    seen = [json.loads(record.read_text()) for record in records]
    assert all(rank["grad_norms"] == seen[0]["grad_norms"] for rank in seen), "norms differ"
    return TrainingRun(
        losses=tuple(seen[-1]["losses"]),
        grad_norms=tuple(seen[-1]["grad_norms"]),
        validation_losses=tuple(seen[-1]["validation_losses"]),
        gradients={name: tuple(pair) for rank in seen for name, pair in rank["gradients"].items()},
        num_early_reductions=tuple(len(rank["early_reductions"]) for rank in seen),
        seconds=time.monotonic() - start,
        log=logs[-1].read_text(errors="replace"),
        owner_log=logs[0].read_text(errors="replace"),
    )


def _run_rank(environment: dict[str, str], arguments: Sequence[str], log: str, record: str) -> None:
    # A group of its own, so that the processes that write checkpoints end with it.
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Not at the top: the process that starts the ranks must stay free of torch and Megatron.
    from training_process import run_rank

    run_rank(environment, arguments, record)


def _end(process: BaseProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has ended and left nobody behind, or has not got as far as having a group.
        process.kill()
    process.join(10)


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Return when all have ended, soon after one has failed, or when the time is over."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.05)
