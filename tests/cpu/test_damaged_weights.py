"""Weights that are damaged are refused in one line, and results are written whole."""

import pytest
import torch
from lavin_setup import clip_stages, language_stages, move_adapters
from models_setup import base_config, megatron_on_cpu

from megatron_dip.errors import CheckpointError
from megatron_dip.families.lavin.checkpoint import load_adapters, save_adapters


@pytest.fixture(scope="module")
def base():
    with megatron_on_cpu():
        yield base_config(torch.float32)


def make_stages(base, *, moved=False):
    stages = [*clip_stages(base), *language_stages(base)]
    if moved:
        move_adapters(stages)
    return stages


def invert(tensor: torch.Tensor) -> torch.Tensor:
    """All bits the other way round, as a bad block may come back."""
    return (~tensor.view(torch.int32)).view(torch.float32)


@pytest.mark.parametrize(
    "damage",
    [invert, lambda t: t.fill_(torch.nan), lambda t: t.fill_(torch.inf)],
    ids=["inverted", "nan", "infinite"],
)
def test_weights_that_no_training_made_are_refused_when_they_are_loaded(base, damage):
    stage = make_stages(base)[0]
    whole = {
        name: tensor.clone() for name, tensor in stage.state_dict().items() if tensor is not None
    }
    name = max(whole, key=lambda key: whole[key].numel())
    stage.load_state_dict(whole, strict=False)
    with pytest.raises(CheckpointError, match=rf"rank 0 has loaded it: {name} holds values"):
        stage.load_state_dict(whole | {name: damage(whole[name].clone())}, strict=False)


def test_adapters_that_are_no_numbers_are_refused(base, tmp_path):
    path = tmp_path / "adapters.pt"
    save_adapters(path, make_stages(base, moved=True))
    content = torch.load(path)
    name = next(iter(content["adapters"]))
    for value, message in ((torch.nan, f"{name} holds values"), (None, f"'{name}' is no tensor")):
        damaged = None if value is None else torch.full_like(content["adapters"][name], value)
        torch.save(content | {"adapters": content["adapters"] | {name: damaged}}, path)
        with pytest.raises(CheckpointError, match=message):
            load_adapters(path, make_stages(base))


def test_adapters_that_cannot_be_saved_are_an_error_and_the_old_file_stays(
    base, tmp_path, files_no_longer_than
):
    path = tmp_path / "adapters.pt"
    stages = make_stages(base, moved=True)
    save_adapters(path, stages)
    before = path.read_bytes()
    with (
        files_no_longer_than(1000),
        pytest.raises(CheckpointError, match=r"adapters\.pt: cannot be written \(File too large\)"),
    ):
        save_adapters(path, stages)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
