"""Losses of the parts of a microbatch, through Megatron's own ``forward_step_calc_loss``."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from torch import Tensor

from megatron_dip.integration.losses import LossReports, weighted_forward_step

NUM_MICROBATCHES = 4
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
PARTS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 10))
"""Very unequal ones; the third has no token with a loss."""


def three_parts(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What current scripts return: sum, number of tokens, and both for the log."""
    loss, count = (losses * mask).sum(), mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.double()])}


def two_parts(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What older scripts return: a mean."""
    loss = (losses * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"lm loss": loss.detach().clone()}


LossOfMask = Callable[..., Any]


def run(
    loss_function: LossOfMask, parts: tuple[slice, ...], per_token: bool
) -> tuple[Tensor, Tensor, list[Any]]:
    """Gradient of the scaled loss, number of tokens, reports: of a microbatch run in ``parts``."""
    losses = torch.linspace(0.5, 3.0, len(MASK), dtype=torch.float64, requires_grad=True)
    config: Any = SimpleNamespace(
        calculate_per_token_loss=per_token, timers=None, num_moe_experts=None, mtp_num_layers=None
    )
    reports = LossReports()
    total = torch.zeros([], dtype=torch.int)
    for part in parts:

        def forward_step(data: Any, model: Any, part: slice = part) -> Any:
            return losses[part], partial(loss_function, MASK[part].double())

        step = weighted_forward_step(
            forward_step,
            part_tokens=int(MASK[part].sum()),
            whole_tokens=int(MASK.sum()),
            rank_tokens=int(MASK.sum()),
            per_token=per_token,
        )
        output, loss = step(iter(()), torch.nn.Identity())
        store: list[Any] = []
        scaled, num_tokens = forward_step_calc_loss(
            None, output, loss, config, None, False, NUM_MICROBATCHES, store, 1, True
        )
        scaled.backward()
        total += num_tokens
        reports.add(0, store[0])
    assert losses.grad is not None
    return losses.grad, total, reports.in_order()


@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "per-token"])
@pytest.mark.parametrize("loss_function", [three_parts, two_parts])
def test_gradients_and_reports_of_parts_add_up_to_those_of_the_whole(
    loss_function: LossOfMask, per_token: bool
) -> None:
    expected, num_tokens, (report,) = run(loss_function, (slice(None),), per_token)
    gradient, parts_tokens, (parts_report,) = run(loss_function, PARTS, per_token)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(parts_report["lm loss"], report["lm loss"], rtol=1e-14, atol=0)
    if per_token:
        assert parts_tokens == num_tokens


def test_the_loss_of_a_whole_microbatch_is_megatrons_own() -> None:
    gradient, _, _ = run(three_parts, (slice(None),), per_token=False)
    torch.testing.assert_close(gradient, (MASK / MASK.sum() / NUM_MICROBATCHES).double())
    gradient, num_tokens, _ = run(three_parts, (slice(None),), per_token=True)
    torch.testing.assert_close(gradient, MASK.double())
    assert num_tokens == MASK.sum()


def test_data_that_is_no_loss_passes_through() -> None:
    def forward_step(data: Any, model: Any) -> Any:
        return torch.ones(3), lambda output, non_loss_data: ("kept", output, non_loss_data)

    _, function = weighted_forward_step(
        forward_step, part_tokens=1, whole_tokens=2, rank_tokens=2, per_token=False
    )(iter(()), torch.nn.Identity())
    assert function("output", non_loss_data=True) == ("kept", "output", True)


def test_reports_come_in_the_order_of_microbatches_whatever_the_plan_did() -> None:
    reports = LossReports()
    for microbatch, value in ((2, 1.0), (0, 2.0), (2, 4.0)):
        reports.add(microbatch, {"lm loss": torch.tensor(value)})
    assert [float(report["lm loss"]) for report in reports.in_order()] == [2.0, 5.0]


def test_reports_that_cannot_be_joined_are_refused_with_the_remedy() -> None:
    reports = LossReports()
    reports.add(0, [1.0])
    with pytest.raises(TypeError, match=r"of type list .* unset sub_microbatch_tokens"):
        reports.add(0, [2.0])
