"""Runs of ``examples/pretrain_vlm.py`` that end in an error, and reading what they say."""

import shlex
from pathlib import Path

from forked_ranks import fork_ranks
from launching import REPOSITORY, CompletedRank

__all__ = ["ARGUMENTS", "ERROR_PREFIX", "SCRIPT", "error_of", "run_vlm"]

SCRIPT = REPOSITORY / "examples" / "pretrain_vlm.py"
ARGUMENTS = tuple(
    shlex.split("""
    --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 0.001 --min-lr 0.001
    --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0 --log-interval 1
    --eval-iters 0 --ckpt-format torch_dist --dip-timeout-seconds 20
    --make-vocab-size-divisible-by 1
    """)
)
_TIMEOUT_SECONDS = 280.0
ERROR_PREFIX = "megatron-dip: error: "


def run_vlm(
    folder: Path, num_ranks: int, *arguments: str, script: Path = SCRIPT
) -> list[CompletedRank]:
    """Start the script on ``num_ranks`` processes; ``folder`` takes their logs and must be new."""
    command = [str(script), *ARGUMENTS, *arguments]
    return fork_ranks(folder, num_ranks, command, timeout_seconds=_TIMEOUT_SECONDS)


def error_of(completed: CompletedRank) -> str:
    """The one line that a failed rank says; asserts status 2, no second line, no traceback."""
    shown = completed.output[-3000:]
    assert completed.returncode == 2 and not completed.timed_out, shown
    assert "Traceback" not in completed.output, shown
    errors = [line for line in completed.output.splitlines() if line.startswith(ERROR_PREFIX)]
    assert len(errors) == 1, shown
    return errors[0].removeprefix(ERROR_PREFIX)
