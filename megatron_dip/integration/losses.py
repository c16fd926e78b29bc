"""Losses of sub-microbatches, weighted so that those of a microbatch sum to that of the whole.

Megatron divides a microbatch's loss by its own number of tokens and by the number of
microbatches, or, with ``calculate_per_token_loss``, by the number of tokens in the batch.  A part
of a microbatch must be divided by the tokens of the whole microbatch in the first case.  Where
its rows are divided among context-parallel ranks, Megatron divides the sum of a rank by the tokens
of that rank and averages over the ranks; a mean it takes to be one over all of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["LossReports", "weighted_forward_step"]

LossFunction = Callable[..., Any]
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, LossFunction]]


def weighted_forward_step(
    forward_step: ForwardStep,
    *,
    part_tokens: int,
    whole_tokens: int,
    rank_tokens: int,
    per_token: bool,
) -> ForwardStep:
    """``forward_step`` for a part of a microbatch.

    Args:
        forward_step: The script's own.
        part_tokens: Tokens with loss in the part.
        whole_tokens: Tokens with loss in the whole microbatch.
        rank_tokens: Of these, those on this context-parallel rank.
        per_token: Megatron's ``calculate_per_token_loss``.
    """

    def step(data: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        output, loss_function = forward_step(data, model)

        def weighted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = loss_function(output, *args, **kwargs)
            if kwargs.get("non_loss_data"):
                return result
            if len(result) == 3:
                loss, num_tokens, report = result
                if not per_token:
                    num_tokens = torch.full_like(num_tokens, rank_tokens)
                return loss, num_tokens, report
            loss, report = result
            weight = part_tokens / max(whole_tokens, 1)
            return loss * weight, {key: _weigh(value, weight) for key, value in report.items()}

        return output, weighted

    return step


def _weigh(value: torch.Tensor, weight: float) -> torch.Tensor:
    """A mean is weighted; a pair of sum and count adds up as it is."""
    return value * weight if torch.as_tensor(value).numel() == 1 else value


class LossReports:
    """What a script's loss function reports, one entry per microbatch."""

    def __init__(self) -> None:
        self._reports: dict[int, Any] = {}

    def add(self, microbatch: int, report: Any) -> None:
        """Add the report of a part of ``microbatch``; sums and weighted means add up."""
        so_far = self._reports.get(microbatch)
        if so_far is None:
            self._reports[microbatch] = report
        elif isinstance(report, dict):
            self._reports[microbatch] = {key: so_far[key] + report[key] for key in report}
        else:
            raise TypeError(
                f"cannot join reports of type {type(report).__name__} from parts of a microbatch "
                f"(expected a dict of tensors; unset sub_microbatch_tokens to keep them whole)"
            )

    def in_order(self) -> list[Any]:
        return [self._reports[microbatch] for microbatch in sorted(self._reports)]
