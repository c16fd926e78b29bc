"""MimoModel in stages against the whole model, in one process: losses and every gradient."""

import pytest
import torch
from megatron.core.models.mimo import MimoModel
from mimo_setup import (
    IMAGE_TOKEN,
    NUM_TOKENS,
    ROWS_PER_SOUND,
    SOUND_TOKEN,
    SoundEncoder,
    mimo_config,
)
from models_setup import megatron_on_cpu
from staged_loop import RUN, Setting, assert_same, run_stages, run_whole

from megatron_dip.costs import ItemSize
from megatron_dip.errors import DataError, PartitionError, UnsupportedError
from megatron_dip.models import encoders
from megatron_dip.models.encoders import register_encoder
from megatron_dip.models.facts import read_facts
from megatron_dip.models.mimo import StagedMimo
from megatron_dip.models.staged import Part

# Of 64 bits: sums over more tensors are taken in another order.
ROUNDING = 1e-13


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


def batch_of(*modalities):
    """Two sequences: two images and a sound in the first, one image and a sound in the second."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 50, (2, NUM_TOKENS), generator=generator)
    inputs = {}
    if "images" in modalities:
        tokens[0, 1:11] = IMAGE_TOKEN
        tokens[1, 4:9] = IMAGE_TOKEN
        pixels = torch.randn(3, 3, 4, 4, dtype=torch.float64, generator=generator)
        inputs["images"] = {"clip": {"x": pixels}}
    if "sounds" in modalities:
        tokens[0, 12:15] = SOUND_TOKEN
        tokens[1, 0:3] = SOUND_TOKEN
        frames = torch.randn(2, ROWS_PER_SOUND, 4, dtype=torch.float64, generator=generator)
        inputs["sounds"] = {"frames": {"frames": frames}}
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(NUM_TOKENS).expand(2, -1),
        "labels": torch.roll(tokens, -1, dims=1).clamp(max=50),
        "loss_mask": (tokens < 50).double(),
        "modality_inputs": inputs,
    }


def step(iterator, model):
    """As in Megatron's example: the sum of the losses, and how many they are."""
    output, loss_mask = model(**next(iterator))
    return output, lambda losses: ((losses * loss_mask).sum(), int(loss_mask.sum()))


def setting(*modalities, **changes):
    given = mimo_config(*modalities)
    for name, value in changes.items():
        setattr(given, name, value)
    return Setting(MimoModel, StagedMimo, {"mimo_config": given}, step)


def built_stage(given, part):
    staged = StagedMimo(given.arguments, RUN)
    with staged.constructing(part):
        model = MimoModel(**staged.stage_arguments(part))
    staged.finish(model, part)
    return model


@pytest.mark.parametrize(
    "cuts",
    [
        {"images": (3,), "language": (3,)},
        {"images": (1, 2), "language": (2, 1)},
        {"images": (0, 2, 1, 0), "language": (0, 1, 2, 0)},
    ],
)
def test_images_and_language_cut_anywhere_give_the_same_loss_and_gradients(cuts):
    batch = batch_of("images")
    found, whole = run_stages(setting("images"), batch, cuts), run_whole(setting("images"), batch)
    assert found.loss == whole.loss
    assert_same(found, whole, tolerance=ROUNDING)


def test_single_images_as_items_give_the_same_loss_and_gradients():
    batch = batch_of("images")
    groups = {"images": [[0], [2], [1]], "language": [[1], [0]]}
    cuts = {"images": (2, 1), "language": (1, 2)}
    found = run_stages(setting("images"), batch, cuts, groups)
    assert_same(found, run_whole(setting("images"), batch), tolerance=ROUNDING)


def test_layers_that_were_on_the_host_give_equal_gradients():
    batch, cuts = batch_of("images"), {"images": (1, 2), "language": (2, 1)}
    found = run_stages(setting("images"), batch, cuts, recompute=(0,), offload=(1, 2))
    assert_same(found, run_whole(setting("images"), batch), tolerance=ROUNDING)


def test_an_encoder_of_which_nothing_is_known_stays_whole_beside_one_that_is_cut():
    given, batch = setting("images", "sounds"), batch_of("images", "sounds")
    cuts = {"images": (1, 2), "sounds": (1, 0), "language": (1, 2)}
    groups = {"sounds": [[1], [0]], "images": [[0, 2], [1]]}
    whole = run_whole(given, batch)
    assert_same(run_stages(given, batch, cuts), whole, tolerance=ROUNDING)
    assert_same(run_stages(given, batch, cuts, groups), whole, tolerance=ROUNDING)


def test_a_sequence_of_text_alone_takes_no_images():
    batch = batch_of("images")
    batch["input_ids"][1, 4:9] = 7
    batch["modality_inputs"]["images"]["clip"]["x"] = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    cuts = {"images": (1, 2), "language": (3,)}
    found = run_stages(setting("images"), batch, cuts, {"language": [[0], [1]]})
    assert_same(found, run_whole(setting("images"), batch), tolerance=ROUNDING)


def test_an_encoder_that_stays_whole_is_one_layer_and_its_projection_comes_after_it():
    given = setting("sounds")
    built = {
        part: built_stage(given, part)
        for part in (
            Part("sounds", 0, 1, first=True, last=False),
            Part("sounds", 1, 0, first=False, last=True),
        )
    }
    first, last = (read_facts(stage, part) for part, stage in built.items())
    assert [layer.trained for layer in first.layers] == [4 * 6 + 6]
    assert (last.layers, last.after.trained) == ((), 6 * 16 + 16)


def test_an_encoder_that_is_described_says_its_own_sizes(monkeypatch):
    monkeypatch.setattr(encoders, "_ENCODERS", dict(encoders._ENCODERS))

    @register_encoder(SoundEncoder)
    class StagedSounds(encoders._WholeEncoder):
        def sizes(self, inputs, num_places):
            return tuple(ItemSize(tokens=len(one), spans=(2, 1)) for one in inputs["frames"])

    staged = StagedMimo({"mimo_config": mimo_config("sounds")}, RUN)
    sizes = staged.items(batch_of("sounds"))
    assert [size.spans for size in sizes["sounds"]] == [(2, 1), (2, 1)]
    assert [size.needs for size in sizes["language"]] == [{"sounds": (0,)}, {"sounds": (1,)}]


def test_rows_that_do_not_fill_their_places_are_reported():
    batch = batch_of("images")
    batch["input_ids"][1, 4] = 7
    staged = StagedMimo({"mimo_config": mimo_config("images")}, RUN)
    with pytest.raises(DataError, match=r"sample 1 .* has 4 places, and items \[2\] have 5 rows"):
        staged.items(batch)


def two_encoders(given):
    encoders = given.modality_submodules_spec["images"].submodules["encoders"]
    encoders["another"] = encoders["clip"]


def no_token(given):
    given.special_token_ids = {}


def own_grids(given):
    given.module_to_grid_map = {"images": None}


def another_language_model(given):
    given.language_model_spec.module = torch.nn.Linear


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (two_encoders, r"modality images of \{'encoders': 2.*expected one encoder"),
        (no_token, "without a token for modality images"),
        (own_grids, "module_to_grid_map"),
        (another_language_model, "a Linear as language model"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(change, reason):
    given = mimo_config("images")
    change(given)
    with pytest.raises(UnsupportedError, match=reason):
        StagedMimo({"mimo_config": given}, RUN)


def test_an_encoder_that_stays_whole_must_be_on_the_first_rank():
    staged = StagedMimo({"mimo_config": mimo_config("sounds")}, RUN)
    with pytest.raises(PartitionError, match="its only layer is a whole SoundEncoder"):
        staged.stage_arguments(Part("sounds", 0, 0, first=True, last=False))
