"""Reductions of gradients as Megatron's wrappers make them, one per bucket group of a stage.

Megatron looks for NaN in a bucket before it reduces it, and waits for the device to answer.  While
others still compute, that would stop the host once per bucket.  Here the norms are taken at the
same place, on the device, and looked at together when the step's computing has been issued: before
gradients are used, with the same verdicts and messages, on this rank's own gradients as before.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from megatron_dip.runtime import Reduction

__all__ = ["GradientChecks", "bucket_reductions"]


class _Check(NamedTuple):
    """A look at the norms of a bucket group's gradients that is still to come."""

    group: Any
    norms: list[torch.Tensor]
    """Of its buckets, on the device."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """Of Megatron's ``check_grads``."""


class GradientChecks:
    """The looks at gradients of one step."""

    def __init__(self) -> None:
        self._checks: list[_Check] = []

    def postpone(self, group: Any) -> Callable[..., None]:
        """What stands for ``check_grads`` of a bucket group while its reduction is started."""

        def check_grads(*args: Any, **kwargs: Any) -> None:
            norms = [bucket.grad_data.norm(p=2) for bucket in group.buckets]
            self._checks.append(_Check(group, norms, (args, kwargs)))

        return check_grads

    def finish(self) -> None:
        """Have Megatron judge all norms, in order; the host waits for the device once.

        Raises:
            RuntimeError: Megatron's, where it finds NaN or Inf and reruns are off.
        """
        checks, self._checks = self._checks, []
        if not checks:
            return
        norms = torch.stack([norm for check in checks for norm in check.norms])
        left = iter(norms.cpu())
        for group, own, (args, kwargs) in checks:
            known = [_Known(next(left)) for _ in own]
            with patch.object(group, "buckets", known):
                type(group).check_grads(group, *args, **kwargs)


class _Known:
    """Stands for a bucket whose norm has been taken."""

    def __init__(self, norm: torch.Tensor) -> None:
        self.grad_data = self
        self._norm = norm

    def norm(self, p: int) -> torch.Tensor:
        assert p == 2, "the norm that Megatron checks"
        return self._norm


class _BucketReduction:
    """The reduction of one bucket group."""

    def __init__(self, group: Any, checks: GradientChecks) -> None:
        self._group, self._checks = group, checks

    def start(self) -> None:
        with (
            patch.object(self._group, "check_grads", self._checks.postpone(self._group)),
            # With sums in 32 bits Megatron would first have computing wait for the one before it,
            # and so for replicas whose plans differ.  All are waited for at the end of the step.
            patch.object(self._group, "previous_grad_reduce_bucket_group", None, create=True),
        ):
            self._group.start_grad_sync()

    def is_ended(self) -> bool:
        handle = self._group.grad_reduce_handle
        # A manager of collectives that were issued together, or what sums in 32 bits after one.
        works = getattr(handle, "works", [getattr(handle, "all_to_all_handle", handle)])
        return all(work is not None and work.is_completed() for work in works)


def bucket_reductions(chunk: Any, checks: GradientChecks) -> Sequence[Reduction]:
    """One reduction per bucket group of a wrapped chunk, in the order in which it starts them."""
    groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
    return [_BucketReduction(group, checks) for group in groups]
