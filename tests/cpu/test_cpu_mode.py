"""Megatron's own training loop on CPU: layouts agree, and a resumed run continues as if whole."""

import subprocess
import sys
from pathlib import Path

import pytest
from gpt_runs import losses_of, train, validation_loss_of
from launching import REPOSITORY

DROPOUT = ("--attention-dropout", "0.1", "--hidden-dropout", "0.1")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def weights(checkpoints: Path) -> Path:
    """A checkpoint from which every layout starts: seeds give each layout other weights."""
    folder = checkpoints / "weights"
    save = ("--save", str(folder), "--save-interval", "1", "--no-save-optim")
    train(1, "--train-iters", "1", *save)
    return folder


def run_from(weights: Path, num_ranks: int, *layout: str) -> tuple[dict, float]:
    load = ("--load", str(weights), "--finetune", "--no-load-optim", "--no-load-rng")
    checked = (*load, "--exit-on-missing-checkpoint", "--train-iters", "3")
    completed = train(num_ranks, *checked, *layout)
    return losses_of(completed), validation_loss_of(completed)


def test_every_layout_computes_the_same_losses_and_gradient_norms(weights: Path) -> None:
    losses, validation_loss = run_from(weights, 1)
    assert losses[3][0] < losses[1][0]
    pipeline = run_from(weights, 2, "--pipeline-model-parallel-size", "2")
    tensor = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    data = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    for other_losses, other_validation_loss in (
        pipeline,
        run_from(weights, 2, *tensor),
        run_from(weights, 2, *data),
    ):
        assert other_validation_loss == pytest.approx(validation_loss, abs=1e-5)
        for iteration, expected in losses.items():
            # The log gives three decimals of the norm.
            assert other_losses[iteration] == pytest.approx(expected, abs=2e-3, rel=1e-6)
            assert other_losses[iteration][0] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        ("--use-distributed-optimizer", "--pipeline-model-parallel-size", "2"),
        ("--bf16", "--tensor-model-parallel-size", "2"),
        ("--optimizer", "sgd"),
    ],
    ids=["distributed-adam", "adam-bf16", "sgd"],
)
def test_a_resumed_run_with_dropout_continues_as_if_it_had_not_stopped(
    checkpoints: Path, optimizer: tuple[str, ...]
) -> None:
    folder = checkpoints / "-".join(optimizer)
    arguments = (*DROPOUT, *optimizer, "--train-iters", "4")
    num_ranks = 2 if "parallel-size" in " ".join(optimizer) else 1
    whole = train(num_ranks, *arguments, "--save", str(folder), "--save-interval", "2")
    resume = ("--load", str(folder), "--ckpt-step", "2", "--exit-on-missing-checkpoint")
    resumed = train(num_ranks, *arguments, *resume)
    assert set(losses_of(resumed)) == {3, 4}
    # The log gives seven digits of the loss, and three decimals of the norm.
    assert losses_of(resumed)[3] == pytest.approx(losses_of(whole)[3], abs=2e-3, rel=1e-6)
    assert losses_of(resumed)[3][0] == pytest.approx(losses_of(whole)[3][0], rel=1e-5)
    # The loss of its second line is a mean with the first; the norm is that of the step.
    assert losses_of(resumed)[4][1] == pytest.approx(losses_of(whole)[4][1], abs=2e-3)
    assert validation_loss_of(resumed) == pytest.approx(validation_loss_of(whole), rel=1e-5)
    # One generator plays two parts here: Megatron would warn at every dropout.
    assert "CPU RNG state changed" not in whole.output


# One process: importing Megatron is what takes the time.
INSIDE = """
import torch
from torch.utils.data import DataLoader

original_tensor_to = torch.Tensor.to
from megatron_dip.integration import cpu_mode

assert not cpu_mode.is_enabled() and torch.Tensor.to is original_tensor_to
cpu_mode.enable()
cpu_mode.enable()
assert cpu_mode.is_enabled()

for device in ("cuda", "cuda:1", torch.device("cuda", 0), torch.cuda.current_device()):
    assert torch.zeros(2, device=device, pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to(device).to(device, torch.float16).cuda(0).device.type == "cpu"
assert torch.zeros(1, device="meta").device.type == "meta"
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
assert torch.zeros(1).type(torch.cuda.DoubleTensor).dtype == torch.float64

torch.manual_seed(1)
expected = torch.rand(3)
torch.manual_seed(1)
loaded = [next(iter(DataLoader(torch.arange(9), shuffle=True))) for _ in range(2)]
assert torch.equal(torch.rand(3), expected), "loading data moved the device's generator"

start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record()
end.record()
assert start.elapsed_time(end) >= 0.0

assert torch.compile(len) is len, "functions of modules that are imported later are compiled"
print("all good")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False
    )


def test_a_cuda_device_means_the_cpu_and_data_loading_has_its_own_random_numbers() -> None:
    finished = run_python(INSIDE)
    assert finished.stdout.strip() == "all good", finished.stderr


def test_enabling_after_megatron_was_imported_is_refused() -> None:
    code = "import megatron.core.enums\nfrom megatron_dip.integration import cpu_mode\n"
    finished = run_python(code + "cpu_mode.enable()")
    assert finished.returncode != 0
    assert "must be enabled before Megatron is imported" in finished.stderr
