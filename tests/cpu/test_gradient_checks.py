"""Megatron's look at gradients before they are reduced: later, at once, with the same verdicts."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.distributed.reduce_scatter_with_fp32_accumulation import (
    _ReduceScatterWithFP32AccumulationWorkHandle,
)

from megatron_dip.integration.reductions import GradientChecks, bucket_reductions


class Group:
    """A bucket group that notes its reductions and has Megatron's own check."""

    check_grads = _ParamAndGradBucketGroup.check_grads

    def __init__(self, *gradients: list[float]) -> None:
        self.buckets = [SimpleNamespace(grad_data=torch.tensor(values)) for values in gradients]
        self.grad_reduce_handle: Any = None
        self.previous_grad_reduce_bucket_group: Group | None = None

    def start_grad_sync(self) -> None:
        self.check_grads(check_for_nan_or_inf=True, check_for_large=False)
        self.grad_reduce_handle = SimpleNamespace(
            works=[SimpleNamespace(is_completed=lambda: self.is_reduced)]
        )
        self.is_reduced = False


@pytest.fixture(autouse=True)
def _no_reruns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", None)
    rerun_state_machine.initialize_rerun_state_machine(mode=rerun_state_machine.RerunMode.DISABLED)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield


def reductions_of(*groups: Group) -> tuple[GradientChecks, list[Any]]:
    checks = GradientChecks()
    chunk = SimpleNamespace(bucket_groups=groups[:1], expert_parallel_bucket_groups=groups[1:])
    return checks, list(bucket_reductions(chunk, checks))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_wrong_ends_the_step_with_the_words_of_megatron(wrong: float) -> None:
    good, bad = Group([1.0, 2.0]), Group([3.0], [4.0, wrong])
    with pytest.raises(RuntimeError) as expected:
        bad.start_grad_sync()
    assert "for bucket #1 in backward pass before data-parallel communication" in str(expected)
    checks, reductions = reductions_of(good, bad)
    for reduction in reductions:
        reduction.start()
    with pytest.raises(RuntimeError) as found:
        checks.finish()
    assert str(found.value) == str(expected.value)


def test_nothing_is_looked_at_while_reductions_start_and_all_of_it_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    for name in ("isnan", "isinf"):
        judge = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda tensor, judge=judge: looked.append(float(tensor)) or judge(tensor)
        )
    first, second = Group([3.0, 4.0]), Group([5.0])
    checks, reductions = reductions_of(first, second)
    for reduction in reductions:
        reduction.start()
    assert looked == []
    # As the device would, when it reduces: the norms were taken before.
    first.buckets[0].grad_data *= 100
    checks.finish()
    assert looked == [5.0, 5.0, 5.0, 5.0]
    checks.finish()
    assert len(looked) == 4, "each once"


def test_a_reduction_has_ended_when_all_of_its_collectives_have() -> None:
    group = Group([1.0])
    _, (reduction,) = reductions_of(group)
    assert not reduction.is_ended()
    reduction.start()
    assert not reduction.is_ended()
    group.is_reduced = True
    assert reduction.is_ended()


def test_sums_in_32_bits_neither_wait_for_the_one_before_them_nor_hide_their_end() -> None:
    # The group before it is under way; Megatron would have computing wait for it.
    before, group = Group([1.0]), Group([2.0])
    group.previous_grad_reduce_bucket_group = before
    seen: list[Any] = []

    def start_grad_sync() -> None:
        seen.append(group.previous_grad_reduce_bucket_group)
        exchange = SimpleNamespace(is_completed=lambda: group.is_reduced)
        group.grad_reduce_handle = _ReduceScatterWithFP32AccumulationWorkHandle(
            exchange, torch.zeros(2), torch.zeros(1), 2
        )
        group.is_reduced = False

    group.start_grad_sync = start_grad_sync  # type: ignore[method-assign]
    _, (reduction,) = reductions_of(group)
    reduction.start()
    assert seen == [None] and group.previous_grad_reduce_bucket_group is before
    assert not reduction.is_ended()
    group.is_reduced = True
    assert reduction.is_ended()
