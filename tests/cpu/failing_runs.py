"""Runs of ``examples/pretrain_vlm.py`` that end in an error, and reading what they say.

Ranks are forked from a process that has imported Megatron, see ``training_process``: a run that
fails early costs a second instead of ten.
"""

import multiprocessing
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from launching import REPOSITORY, CompletedRank, free_port

__all__ = ["ARGUMENTS", "SCRIPT", "error_of", "run_vlm"]

SCRIPT = REPOSITORY / "examples" / "pretrain_vlm.py"
ARGUMENTS = tuple(
    shlex.split("""
    --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 0.001 --min-lr 0.001
    --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0 --log-interval 1
    --ckpt-format torch_dist --dip-timeout-seconds 20 --make-vocab-size-divisible-by 1
    """)
)
_TIMEOUT_SECONDS = 60.0
# After the first rank has failed: enough for the others to end by themselves.
_GRACE_SECONDS = 3.0
_PREFIX = "megatron-dip: error: "


def run_vlm(
    folder: Path, num_ranks: int, *arguments: str, script: Path = SCRIPT
) -> list[CompletedRank]:
    """Start the script on ``num_ranks`` processes; ``folder`` takes their logs and must be new."""
    folder.mkdir(parents=True)
    environment = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_process"])
    command = [str(script), *ARGUMENTS, *arguments]
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # No daemons: data loaders have workers, and daemons may have no children.
            processes.append(context.Process(target=_run_rank, args=(own, command, str(log))))
            processes[-1].start()
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while any(p.exitcode is None for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            time.sleep(0.05)
        timed_out = [p.exitcode is None for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.join(10)
    return [
        CompletedRank(
            returncode=int(process.exitcode or 0),
            output=log.read_text(errors="replace") if log.exists() else "",
            timed_out=late,
        )
        for process, log, late in zip(processes, logs, timed_out, strict=True)
    ]


def _run_rank(environment: dict[str, str], command: Sequence[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Not at the top: the process that starts the ranks must stay free of torch and Megatron.
    from training_process import run_rank

    run_rank(environment, command, os.devnull)


def error_of(completed: CompletedRank) -> str:
    """The one line that a failed rank says; asserts status 2, no second line, no traceback."""
    shown = completed.output[-3000:]
    assert completed.returncode == 2 and not completed.timed_out, shown
    assert "Traceback" not in completed.output, shown
    errors = [line for line in completed.output.splitlines() if line.startswith(_PREFIX)]
    assert len(errors) == 1, shown
    return errors[0].removeprefix(_PREFIX)
