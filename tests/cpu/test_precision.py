"""Loss scaling, and backwards in two parts, under plans."""

import re
from types import SimpleNamespace

import pytest
import torch
from gpt_runs import train

from megatron_dip.errors import UnsupportedError
from megatron_dip.families.packed.model import PackedModel
from megatron_dip.families.t2v.model import PackedT2v
from megatron_dip.integration.runner import MegatronRunner
from megatron_dip.integration.weight_gradients import StoredWeightGradients, require_delays
from megatron_dip.runtime import SavedForward

_LINE = re.compile(r"iteration +\d+/.*?global batch size: +\d+ \| (.*)")
_ROUNDED = re.compile(r"(?:lm loss|grad norm): (\S+)")
# Searched plans add gradients up in another order than Megatron's own, which plans of 1F1B keep:
# that may turn the last bit of a weight in 16 bits.
ROUNDING = 2.0**-11
SCALING = ("--fp16", "--initial-loss-scale", "8192", "--loss-scale-window", "2")


def lines_of(completed):
    """Per iteration what the log says of loss, scale, gradients and skipped steps."""
    return [found.group(1) for found in map(_LINE.search, completed.output.splitlines()) if found]


def test_steps_that_overflow_are_skipped_and_scales_follow_as_under_megatrons_schedule(tmp_path):
    arguments = ("--pipeline-model-parallel-size", "2", "--train-iters", "6", "--hysteresis", "1")
    config = tmp_path / "one_f_one_b.yaml"
    config.write_text("schedule: {planner: one_f_one_b}\n")
    stock = lines_of(train(2, *arguments, *SCALING))
    plans = ("--dip-schedule", "--dip-config", str(config))
    assert lines_of(train(2, *arguments, *SCALING, *plans)) == stock and len(stock) == 6
    searched = lines_of(train(2, *arguments, *SCALING, "--dip-schedule"))
    for ours, theirs in zip(searched, stock, strict=True):
        assert _ROUNDED.sub("", ours) == _ROUNDED.sub("", theirs)
        values = [[float(value) for value in _ROUNDED.findall(line)] for line in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=ROUNDING)
    skipped = [line for line in stock if "skipped iterations:   0" not in line]
    assert 0 < len(skipped) < 6
    assert len({re.search(r"loss scale: (\S+)", line).group(1) for line in stock}) > 2


class _Accumulating(torch.autograd.Function):
    """A linear layer that adds to ``main_grad`` by the way, as Megatron's and Apex's do."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        return rows @ weight.T

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.T @ rows)
        return grad @ weight, None


class _Delaying(torch.nn.Module):
    """What is asked of a layer of Transformer Engine that puts weight gradients off."""

    def __init__(self, hooks=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.config, self.weight_names, self.bias_names = None, ["weight"], []
        self.apply_bias = self.gemm_bias_unfused_add = False
        self.wgrad_accumulation_and_reduce_hooks = list(hooks)
        self.wgrad_store = SimpleNamespace(delay_wgrad_compute=lambda: True)

    def backward_dw(self):
        raise NotImplementedError

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        raise NotImplementedError


def runner_of(scale):
    """A runner as far as its backwards go, of one stage whose layers put nothing off."""
    runner = MegatronRunner.__new__(MegatronRunner)
    runner._stored_weights = {0: StoredWeightGradients(())}
    runner._put_off = {}
    runner._config = SimpleNamespace(
        timers=None,
        grad_scale_func=lambda loss: loss * scale,
        deallocate_pipeline_outputs=False,
        num_moe_experts=None,
    )
    return runner


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
def test_layers_that_add_to_their_gradients_themselves_do_it_once(is_split):
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    weight.main_grad = torch.zeros(2, 2)
    rows = torch.tensor([[1.0, -1.0]], requires_grad=True)
    call = SimpleNamespace(
        inputs=[SimpleNamespace(tensor=rows)], work="0F0", stage=SimpleNamespace(stage=0)
    )
    saved = SavedForward(call=call, output=_Accumulating.apply(rows, weight).sum())
    runner = runner_of(8.0)
    if is_split:
        (grad,) = runner.input_grad(saved, None)
        runner.weight_grad(saved)
    else:
        (grad,) = runner.backward(saved, None)
    assert torch.equal(weight.main_grad, 8.0 * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    assert torch.equal(grad, 8.0 * torch.tensor([[4.0, 6.0]]))


def test_split_backwards_need_layers_that_keep_weight_gradients_apart():
    plain = {"fp8": None, "tp_comm_overlap": False}
    require_delays([0, 3], SimpleNamespace(**plain))
    with pytest.raises(UnsupportedError, match="split_backward needs layers") as refused:
        require_delays([0, 0], SimpleNamespace(**plain))
    assert "--transformer-impl transformer_engine" in str(refused.value)
    for field, flag in (("fp8", "--fp8-format"), ("tp_comm_overlap", "--tp-comm-overlap")):
        with pytest.raises(UnsupportedError, match=f"does not work with {flag}"):
            require_delays([3], SimpleNamespace(**plain | {field: True}))


def test_weight_gradients_that_nobody_would_add_up_are_refused():
    StoredWeightGradients([torch.nn.Linear(1, 1), _Delaying([print])])
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        StoredWeightGradients([_Delaying()])


def test_rows_that_megatrons_schedule_would_hand_on_unfilled_are_refused_in_8_bits():
    held = SimpleNamespace(
        _seq_length=24,
        backbone=SimpleNamespace(num_shards=2),
        _train_sequences=2,
        _eval_sequences=2,
    )
    PackedModel.check_handed_rows(held, 32)
    with pytest.raises(UnsupportedError, match=r"2 sequences of 48 tokens .* multiple of 64"):
        PackedModel.check_handed_rows(held, 64)
    with pytest.raises(UnsupportedError, match="--fp8-format does not work with this model"):
        PackedT2v.check_handed_rows(held, 16)
