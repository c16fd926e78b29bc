"""What Megatron's own scripts check of every loss."""

from functools import partial

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args

__all__ = ["check_loss"]

_SPIKY_FACTOR = 10.0
"""A loss is spiky above this multiple of the largest of its first hundred; as in
``pretrain_gpt.py``."""


def check_loss(loss: torch.Tensor) -> None:
    """Have Megatron's rerun machine look at a loss: ``--check-for-spiky-loss``, and that it is a
    finite number, unless ``--no-check-for-nan-in-loss-and-grad``.

    Args:
        loss: A scalar.

    Raises:
        RuntimeError: It is not, and the machine is off (``--rerun-mode disabled``); under a plan
            when the step has done all else.
    """
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_wrong, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=is_wrong,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=_SPIKY_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
