"""LaVIN trains under plans as under Megatron's own schedule: losses, norms and every gradient.

As in ``test_equality``: from the same weights with the same batches; dropout is off.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from equality_runs import largest_difference
from launching import REPOSITORY
from tiny_lavin import make_tiny_scienceqa, write_lavin_config
from training_runs import TrainingRun, train

SCRIPT = REPOSITORY / "examples" / "finetune_lavin.py"
NUM_ITERATIONS = 6
# Wider weights than usual: adapters can only steer what random towers do.
SGD = "--optimizer sgd --lr 0.1 --min-lr 0.1 --init-method-std 0.1"
ADAM = "--optimizer adam --lr 0.005 --min-lr 0.005 --init-method-std 0.1"
# Of the gradients of single parameters, after steps of SGD and of Adam, which divides every
# gradient by its own size: the rounding of very small ones becomes a part of the weights.
SGD_GRADIENTS, ADAM_GRADIENTS = 1e-4, 2e-3
SPLIT = {"num_segments": 2, "sub_microbatch_tokens": (20, 176)}
Run = Callable[..., TrainingRun]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lavin")
    make_tiny_scienceqa(folder / "data")
    return folder


def run(folder: Path, name: str, arguments: str, *, dip: bool, **config: object) -> TrainingRun:
    """One run on two pipeline ranks; ``config`` as for ``write_lavin_config``."""
    path = write_lavin_config(folder / f"{name}.yaml", folder / "data", **config)
    schedule = "--dip-schedule" if dip else ""
    text = (
        f"--dip-config {path} --pipeline-model-parallel-size 2 --micro-batch-size 4 "
        f"--global-batch-size 16 --train-iters {NUM_ITERATIONS} --eval-iters 1 --seed 3 "
        f"{schedule} {arguments}"
    )
    return train(folder / name, 2, *shlex.split(text), script=SCRIPT)


def assert_alike(
    ours: TrainingRun, theirs: TrainingRun, tolerance: float, gradients: float = SGD_GRADIENTS
) -> None:
    assert len(ours.losses) == NUM_ITERATIONS
    assert largest_difference(ours.losses, theirs.losses) <= tolerance
    assert largest_difference(ours.grad_norms, theirs.grad_norms) <= 1e-4
    assert largest_difference(ours.validation_losses, theirs.validation_losses) <= tolerance
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert all("adapter" in name for name in ours.gradients)
    for name, (norm, weighed) in theirs.gradients.items():
        assert norm > 0, name
        own_norm, own_weighed = ours.gradients[name]
        assert abs(own_norm - norm) <= gradients * norm, name
        assert abs(own_weighed - weighed) <= gradients * norm, name


@pytest.fixture(scope="module")
def stock_sgd(folder: Path) -> TrainingRun:
    """Leaves its adapters in ``stock.pt``."""
    return run(folder, "stock-sgd", f"{SGD} --save-adapters {folder / 'stock.pt'}", dip=False)


def test_the_mean_of_means_and_every_gradient_are_those_of_the_stock_schedule(
    folder: Path, stock_sgd: TrainingRun
) -> None:
    arguments = f"{SGD} --save-adapters {folder / 'dip.pt'}"
    ours = run(folder, "dip-sgd", arguments, dip=True, **SPLIT)
    assert_alike(ours, stock_sgd, 1e-5)
    assert ours.losses[-1] < 0.97 * ours.losses[0]
    theirs, own = torch.load(folder / "stock.pt"), torch.load(folder / "dip.pt")
    assert theirs["base"] == own["base"]
    for name, value in theirs["adapters"].items():
        torch.testing.assert_close(own["adapters"][name], value, rtol=1e-4, atol=1e-6)


def test_packed_sequences_train_alike_with_adam_under_both_losses(folder: Path) -> None:
    arguments = f"{ADAM} --calculate-per-token-loss"
    stock = run(folder, "stock-adam", arguments, dip=False, packed=True, loss="per_token")
    ours = run(folder, "dip-adam", arguments, dip=True, packed=True, loss="per_token", **SPLIT)
    assert_alike(ours, stock, 1e-4, ADAM_GRADIENTS)
    assert ours.losses[-1] < 0.97 * ours.losses[0]


def test_the_released_router_trains_alike_on_loaded_adapters(
    folder: Path, stock_sgd: TrainingRun
) -> None:
    config = {"adapter": {"gates": "public_code"}}
    arguments = f"{SGD} --load-adapters {folder / 'stock.pt'}"
    stock = run(folder, "stock-public", arguments, dip=False, **config)
    ours = run(folder, "dip-public", arguments, dip=True, num_segments=2, **config)
    assert_alike(ours, stock, 1e-5)
    assert stock.losses[0] < 0.97 * stock_sgd.losses[0]


def test_adapters_are_written_when_training_ends_early(
    folder: Path, stock_sgd: TrainingRun
) -> None:
    """Megatron leaves its loop by ``sys.exit`` there, as after a signal or a duration."""
    path = folder / "early.pt"
    ended = run(folder, "early", f"{SGD} --exit-interval 2 --save-adapters {path}", dip=True)
    assert ended.losses[:2] == pytest.approx(stock_sgd.losses[:2]) and len(ended.losses) == 2
    early, late = torch.load(path), torch.load(folder / "stock.pt")
    assert early["base"] == late["base"] and early["adapters"].keys() == late["adapters"].keys()
    assert any((value != late["adapters"][name]).any() for name, value in early["adapters"].items())
