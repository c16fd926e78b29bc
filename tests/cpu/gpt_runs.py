"""Runs of the small GPT script, and reading their logs."""

import re
import shlex
import sys
import tempfile
from pathlib import Path

from forked_ranks import fork_ranks
from launching import CompletedRank, run_ranks

__all__ = ["GPT_ARGUMENTS", "SCRIPT", "launch", "losses_of", "train", "validation_loss_of"]

SCRIPT = Path(__file__).with_name("megatron_gpt_script.py")
# The vocabulary is padded to a multiple of this times the tensor-parallel size: 64 with any size.
GPT_ARGUMENTS = tuple(
    shlex.split("""
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64
    --seq-length 16 --max-position-embeddings 16 --normalization RMSNorm
    --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 63
    --make-vocab-size-divisible-by 32 --micro-batch-size 2 --global-batch-size 8
    --lr 0.01 --min-lr 0.01 --lr-decay-style constant --calculate-per-token-loss
    --eval-iters 1 --eval-interval 1000 --log-interval 1 --ckpt-format torch_dist
    --attention-dropout 0 --hidden-dropout 0
    """)
)
_TIMEOUT_SECONDS = 280.0
_ITERATION = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+)")
_VALIDATION = re.compile(r"on validation set \| lm loss value: (\S+)")


def launch(*arguments: str) -> CompletedRank:
    """``python -m megatron_dip.launch`` with these arguments in a process of its own."""
    command = [sys.executable, "-m", "megatron_dip.launch", *arguments]
    return run_ranks(1, command, _TIMEOUT_SECONDS)[0]


def train(num_ranks: int, *arguments: str) -> CompletedRank:
    """The last rank of a run on CPU, the one that logs; asserts that all ranks succeeded."""
    command = [str(SCRIPT), *GPT_ARGUMENTS, *arguments]
    with tempfile.TemporaryDirectory(prefix="gpt-") as folder:
        ranks = fork_ranks(
            Path(folder) / "run", num_ranks, command, timeout_seconds=_TIMEOUT_SECONDS
        )
    for rank, completed in enumerate(ranks):
        assert completed.returncode == 0, f"rank {rank}:\n{completed.output[-4000:]}"
    return ranks[-1]


def losses_of(completed: CompletedRank) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm as logged, by iteration.

    Megatron's second line after a start shows the mean of the first two losses.
    """
    found = _ITERATION.findall(completed.output)
    return {int(iteration): (float(loss), float(norm)) for iteration, loss, norm in found}


def validation_loss_of(completed: CompletedRank) -> float:
    """The loss of the evaluation that ends the run."""
    found = _VALIDATION.search(completed.output)
    assert found, completed.output[-4000:]
    return float(found.group(1))
