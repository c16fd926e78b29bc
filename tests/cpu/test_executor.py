"""The executor against a plain loop: loss and every gradient, for module graphs of all kinds."""

from pathlib import Path

import pytest
from forked_ranks import fork_ranks

PROGRAM = Path(__file__).with_name("executor_program.py")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_executor_gives_loss_and_gradients_of_a_plain_loop(num_ranks: int, tmp_path: Path) -> None:
    completed = fork_ranks(tmp_path / "run", num_ranks, [str(PROGRAM)], timeout_seconds=180)
    for rank, one in enumerate(completed):
        assert one.returncode == 0, f"rank {rank}:\n{one.output}"
        assert "within" in one.output
