"""The executor against a plain loop: loss and every gradient, for module graphs of all kinds."""

from pathlib import Path

import pytest
from forked_ranks import fork_ranks

from megatron_dip.plan import format_actions, parse_actions
from megatron_dip.runtime.program import posted_early

PROGRAM = Path(__file__).with_name("executor_program.py")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_executor_gives_loss_and_gradients_of_a_plain_loop(num_ranks: int, tmp_path: Path) -> None:
    completed = fork_ranks(tmp_path / "run", num_ranks, [str(PROGRAM)], timeout_seconds=180)
    for rank, one in enumerate(completed):
        assert one.returncode == 0, f"rank {rank}:\n{one.output}"
        assert "within" in one.output


def test_receives_are_posted_one_compute_action_early_in_their_order() -> None:
    """And nothing else moves; what is received before the first compute action stays there."""
    planned = "0RECV_F0<1 0F0 0B0 0SEND_B0>1 0RECV_F1<1 0RECV_F2<1 0F1 0F2 0REDUCE_GRAD"
    expected = "0RECV_F0<1 0F0 0RECV_F1<1 0RECV_F2<1 0B0 0SEND_B0>1 0F1 0F2 0REDUCE_GRAD"
    assert format_actions(posted_early(parse_actions(planned))) == expected
