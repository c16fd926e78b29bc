"""Runs of the example scripts on tiny models, with losses and norms at full precision."""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from forked_ranks import fork_ranks, record_of
from launching import REPOSITORY

__all__ = ["TrainingRun", "train"]

SCRIPT = REPOSITORY / "examples" / "pretrain_vlm.py"
_COMMON = tuple(
    shlex.split("""
    --lr-decay-style constant --hidden-dropout 0 --attention-dropout 0 --num-workers 0
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --ckpt-format torch_dist
    --dip-timeout-seconds 240 --distributed-timeout-minutes 4 --make-vocab-size-divisible-by 1
    """)
)
_TIMEOUT_SECONDS = 280.0


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
    moved_bytes: tuple[int, ...]
    """Per rank, of activations that were copied to the host."""
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
    start = time.monotonic()
    command = [str(script), *_COMMON, *arguments]
    ranks = fork_ranks(folder, num_ranks, command, timeout_seconds=_TIMEOUT_SECONDS, watch=True)
    for rank, ended in enumerate(ranks):
        how = f"rank {rank} ended with {ended.returncode}:\n{ended.output[-4000:]}"
        assert ended.returncode == 0 and not ended.timed_out, how
    seen = [json.loads(record_of(folder, rank).read_text()) for rank in range(num_ranks)]
    assert all(rank["grad_norms"] == seen[0]["grad_norms"] for rank in seen), "norms differ"
    return TrainingRun(
        losses=tuple(seen[-1]["losses"]),
        grad_norms=tuple(seen[-1]["grad_norms"]),
        validation_losses=tuple(seen[-1]["validation_losses"]),
        gradients={name: tuple(pair) for rank in seen for name, pair in rank["gradients"].items()},
        num_early_reductions=tuple(len(rank["early_reductions"]) for rank in seen),
        moved_bytes=tuple(rank["moved_bytes"] for rank in seen),
        seconds=time.monotonic() - start,
        log=ranks[-1].output,
        owner_log=ranks[0].output,
    )
