"""What the ranks of a pipeline tell one another of a step: a few numbers each, beside the next."""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

from megatron_dip.errors import ChannelError
from megatron_dip.plan.wiring import FloatArray
from megatron_dip.runtime.channels import transfer_failure_reason
from megatron_dip.simulator.measured import SUMS_SHAPE

__all__ = ["RankStep", "StepExchange"]


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """One step on one rank; times in microseconds."""

    rank: float
    """Pipeline rank."""
    makespan_us: float
    """From the plan at hand to the end of the last compute action."""
    busy_us: float
    """Computing."""
    data_us: float
    """Until the data was at hand."""
    plan_us: float
    """From then until the plan was."""
    step_us: float
    """From the begin of this step to that of the next: with optimizer and all else."""
    action_error: float
    """Median part by which the plan's prediction of an action was off."""
    stored_bytes: float
    """Most bytes of activations held at a time; 0 where they were not counted."""


_NUM_NUMBERS = len(fields(RankStep))


class StepExchange:
    """Gathers the steps and the sums of :class:`MeasuredActions` of all ranks of a group.

    Args:
        group: A CPU group with nothing else on it.
        num_stages: Of the partition.
    """

    def __init__(self, group: dist.ProcessGroup, num_stages: int) -> None:
        self._group = group
        self._shape = (num_stages, *SUMS_SHAPE)
        self._pending: tuple[dist.Work, list[torch.Tensor]] | None = None

    def post(self, step: RankStep, sums_us: FloatArray) -> None:
        """Begin to exchange; returns at once. All ranks call it, or none does."""
        numbers = [getattr(step, field.name) for field in fields(RankStep)]
        own = torch.tensor([*numbers, *sums_us.ravel()], dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self._group.size())]
        work = dist.all_gather(gathered, own, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, gathered)

    def take(self) -> tuple[list[RankStep], FloatArray] | None:
        """What was posted last, of all ranks, and the sums added up over them; None if nothing.

        Raises:
            ChannelError: A rank has died, or does not answer within the group's time limit.
        """
        if self._pending is None:
            return None
        work, gathered = self._pending
        self._pending = None
        try:
            work.wait()
        except RuntimeError as error:
            raise ChannelError(
                f"gathering the times of a step failed: {transfer_failure_reason(error)}"
            ) from error
        rows = torch.stack(gathered).numpy()
        steps = [RankStep(**dict(zip(_names(), row[:_NUM_NUMBERS], strict=True))) for row in rows]
        return steps, np.asarray(rows[:, _NUM_NUMBERS:].sum(axis=0)).reshape(self._shape)


def _names() -> list[str]:
    return [field.name for field in fields(RankStep)]
