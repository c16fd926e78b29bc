"""Activations on the host between forward and backward: what moves, what stays, what comes back."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_dip.errors import PlanError, UnsupportedError
from megatron_dip.integration.offload_rules import check_offloads
from megatron_dip.partition import Stage
from megatron_dip.runtime.measure import StoredBytes
from megatron_dip.runtime.offload import OffloadedLayers, Offloader

WIDTH = 16
ROWS = 24
ROOM = 1 << 20
CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    """Saves its rows, views of what it computes, and a table that all share."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.wide = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.back = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor, table: Tensor) -> Tensor:
        gate, value = self.wide(self.norm(rows) * table).chunk(2, dim=-1)
        mixed = functional.silu(gate) * value.transpose(0, 1).contiguous().transpose(0, 1)
        return rows + functional.dropout(self.back(mixed), 0.3)


def offloader(block_bytes: int = 1000, most_bytes: int = ROOM) -> Offloader:
    made = Offloader(CPU, block_bytes)
    made.most_bytes = most_bytes
    return made


class Pass:
    """Three layers, some of them offloaded."""

    def __init__(self, *numbers: int, to: Offloader | None = None) -> None:
        self.layers = [Layer(number) for number in range(3)]
        self.table = torch.linspace(0.5, 1.5, WIDTH).repeat(ROWS, 1)
        self.offload = OffloadedLayers(to or offloader(), numbers)
        self.stored = StoredBytes(p for layer in self.layers for p in layer.parameters())
        self.offload.stored = self.stored
        torch.manual_seed(7)
        self.leaf = torch.randn(ROWS, WIDTH).requires_grad_()
        rows = self.leaf
        for number, layer in enumerate(self.layers):
            if number in numbers:
                with self.offload.keeping():
                    rows = layer(rows, self.table)
            else:
                with self.stored.counting():
                    rows = layer(rows, self.table)
        self.loss = rows.square().sum()

    def away(self) -> None:
        self.offload.copy_out([self.leaf])
        self.offload.release()

    def back(self) -> None:
        self.offload.take_again()
        self.offload.copy_back()

    def gradients(self) -> list[Tensor]:
        self.loss.backward()
        self.offload.end()
        weights = [p.grad for layer in self.layers for p in layer.parameters()]
        return [self.leaf.grad, *weights]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_what_comes_back_gives_the_same_gradients(numbers):
    expected = Pass().gradients()
    ours = Pass(*numbers)
    before = ours.stored.held
    ours.away()
    assert ours.offload._offloader.moved_bytes > len(numbers) * 5 * ROWS * WIDTH * 4
    assert ours.stored.held == before - ours.offload._offloader.moved_bytes
    ours.back()
    assert ours.stored.held == before
    assert_equal(ours.gradients(), expected)
    assert ours.stored.held == 0
    assert ours.stored.peak == before


def test_all_that_offloaded_layers_alone_hold_leaves_the_device():
    ours = Pass(0, 1, 2)
    address = ours.leaf.untyped_storage()
    kept_bytes = ours.stored.held - ours.table.nbytes
    ours.away()
    assert address.nbytes() == 0, "the rows that the stage received go too"
    assert ours.table.untyped_storage().nbytes(), "a table has other holders"
    assert all(p.untyped_storage().nbytes() for layer in ours.layers for p in layer.parameters())
    assert ours.offload._offloader.moved_bytes == kept_bytes


def test_rows_that_another_work_reads_stay():
    ours = Pass(0, 1)
    another = ours.leaf.detach()
    ours.away()
    assert another.untyped_storage().nbytes() == another.nbytes


@pytest.mark.parametrize("both", [False, True])
def test_what_a_layer_that_stays_saves_too_stays_with_it(both):
    ours = OffloadedLayers(offloader(), (0, 1) if both else (0,))
    leaf = torch.ones(100).requires_grad_()
    with ours.keeping():
        rows = torch.exp(leaf)
    with ours.keeping() if both else nullcontext():
        rows = rows.square()
    loss = rows.sum()
    del rows
    ours.copy_out([leaf])
    assert ours._offloader.moved_bytes == 400 * both
    ours.release()
    ours.take_again()
    ours.copy_back()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * torch.ones(100).exp().square())


def test_without_a_way_back_the_backward_says_so():
    ours = Pass(1)
    ours.away()
    with pytest.raises(PlanError, match="no RELOAD before it"):
        ours.loss.backward()


@pytest.mark.parametrize("moves", [False, True])
def test_a_change_in_place_is_found_as_autograd_finds_it(moves):
    ours = OffloadedLayers(offloader(), (0,))
    rows = torch.ones(4).requires_grad_()
    with ours.keeping():
        output = torch.exp(rows * 2)
    if moves:
        ours.copy_out([])
    output.detach().mul_(3)
    with pytest.raises(RuntimeError, match=r"changed in place: it is at version 1 \(expected 0\)"):
        output.sum().backward()


def test_host_memory_is_used_again_and_never_passes_its_limit(caplog):
    one = offloader(block_bytes=4096)
    for _ in range(3):
        ours = Pass(0, 1, to=one)
        ours.away()
        ours.back()
        ours.gradients()
    assert one.blocks.bytes_in_use == 0
    assert one.blocks.num_blocks * 4096 < one.moved_bytes / 2
    least = offloader(block_bytes=4096, most_bytes=3 * 4096 + 100)
    ours = Pass(0, 1, to=least)
    ours.away()
    assert least.blocks.num_blocks == 3
    assert 2 * 4096 < least.moved_bytes <= 3 * 4096
    assert "stay on the device" in caplog.text
    ours.back()
    assert_equal(ours.gradients(), Pass().gradients())


def test_a_tensor_that_nothing_needs_any_more_is_not_copied():
    ours = OffloadedLayers(offloader(), (0,))
    rows = torch.ones(1000).requires_grad_()
    with ours.keeping():
        torch.exp(rows)
    ours.copy_out([rows])
    assert ours._offloader.moved_bytes == 0


def test_what_cannot_be_moved_is_refused_at_the_start():
    stage = Stage(stage=0, module="vision", segment=0, rank=0, first_layer=0, num_layers=2)
    listed = torch.nn.ModuleList(Layer(number) for number in range(2))
    chunk = torch.nn.Sequential(listed)
    with pytest.raises(UnsupportedError, match=r"layers \[0, 1\] of vision are not told apart"):
        check_offloads({stage: chunk}, SimpleNamespace(recompute_granularity=None))
    for number, layer in enumerate(listed):
        layer.layer_number = number + 1
    check_offloads({stage: chunk}, SimpleNamespace(recompute_granularity="selective"))
    with pytest.raises(UnsupportedError, match="--recompute-granularity full"):
        check_offloads({stage: chunk}, SimpleNamespace(recompute_granularity="full"))


class AddsToItsWeight(torch.autograd.Function):
    """As layers do whose weight gradients are summed up by their kernels."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, None, weight)
        return rows @ weight

    @staticmethod
    def backward(ctx, grad):
        rows, _, weight = ctx.saved_tensors
        weight.main_grad += rows.T @ grad
        weight.is_added = True
        return grad @ weight.T, None


@pytest.mark.parametrize("hooks", ["none", "counting", "offloading", "both"])
def test_a_backward_is_handed_the_weight_itself(hooks):
    """With the attributes that others set on it, and what it sets is seen by them."""
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    weight.main_grad = torch.zeros(WIDTH, WIDTH)
    rows = torch.randn(ROWS, WIDTH).requires_grad_()
    offload = OffloadedLayers(offloader(), (0,))
    stored = StoredBytes([weight])
    with (
        stored.counting() if hooks in ("counting", "both") else nullcontext(),
        offload.keeping() if hooks in ("offloading", "both") else nullcontext(),
    ):
        output = AddsToItsWeight.apply(rows.exp(), weight)
    if hooks in ("offloading", "both"):
        offload.copy_out([])
        offload.release()
        offload.take_again()
        offload.copy_back()
        assert offload._offloader.moved_bytes == rows.nbytes
    output.sum().backward()
    assert weight.is_added and weight.grad is None
    assert torch.equal(weight.main_grad, rows.exp().T @ torch.ones(ROWS, WIDTH))
