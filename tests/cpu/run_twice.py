"""Lines of a script over ``pretrain_vlm``, imported as ``example``, which run every step twice."""

__all__ = ["RUN_TWICE"]

RUN_TWICE = """
from megatron.core.rerun_state_machine import get_rerun_state_machine

loss_func = example.loss_func

def validated(loss_mask, losses):
    result = loss_func(loss_mask, losses)
    get_rerun_state_machine().validate_result(
        result=result[0].detach(), rejection_func=lambda loss: True,
        comparison_func=lambda first, second: 1.0, message="loss", fatal=False)
    return result

example.loss_func = validated
"""
"""Megatron's rerun state machine finds every result suspicious."""
