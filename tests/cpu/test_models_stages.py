"""Stages against the uncut module, in 64 bits: outputs and every gradient; spans; recompute."""

import logging

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from models_setup import (
    LANGUAGE_HIDDEN,
    LANGUAGE_LAYERS,
    ROTARY,
    TABLE,
    VISION_LAYERS,
    Tower,
    base_config,
    language_batch,
    language_stages,
    megatron_on_cpu,
    run_chain,
    vision_batch,
    vision_stages,
)
from PIL import Image

from megatron_dip.costs import Boundary, ItemSize
from megatron_dip.errors import PartitionError, UnsupportedError
from megatron_dip.families.data.images import (
    Grid,
    ImageLimits,
    choose_grid,
    image_patches,
    patch_coordinates,
)
from megatron_dip.families.packed import language
from megatron_dip.families.packed.attention import span_params
from megatron_dip.families.packed.initialization import named_global_parameters
from megatron_dip.families.packed.layers import block_submodules
from megatron_dip.families.packed.vision import interpolated_positions
from megatron_dip.families.vlm.batches import VisionBatch
from megatron_dip.models.layout import cut_config
from megatron_dip.models.recompute import recomputed_layers
from megatron_dip.models.staged import Part

# The fused kernels of softmax and norms round differently for other numbers of rows.
TOLERANCE = 1e-12
TOWERS = (TABLE, ROTARY)


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


@pytest.fixture(scope="module")
def base(_megatron):
    return base_config()


def gradients(stages):
    return {
        name: parameter.grad
        for stage in stages
        for name, parameter in named_global_parameters(stage)
    }


def weighted_sum(rows):
    """A scalar in which every element of ``rows`` has a weight of its own."""
    weights = torch.cos(torch.arange(rows.numel(), dtype=torch.float64)).view_as(rows)
    return (rows.double() * weights).sum()


def image_features(batch, seed=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(batch.image_rows), 1, LANGUAGE_HIDDEN)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_equal_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} has no gradient"
        torch.testing.assert_close(
            ours[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_vision(base, cuts, recompute_layers=(), tower=TABLE):
    stages = vision_stages(base, cuts, tower)
    output = run_chain(stages, vision_batch(tower), recompute_layers=recompute_layers)
    weighted_sum(output).backward()
    return output.detach(), gradients(stages)


def run_language(base, cuts, recompute_layers=(), batch=None):
    stages = language_stages(base, cuts)
    batch = batch or language_batch()
    features = image_features(batch) if len(batch.image_rows) else None
    loss = run_chain(stages, batch, features, recompute_layers)
    (loss * batch.loss_mask).sum().backward()
    found = gradients(stages)
    if features is not None:
        found["image features"] = features.grad
    return loss.detach(), found


VISION_CUTS = [(0,), (1,), (2,), (3,), (1, 2), (0, 1, 3)]
LANGUAGE_CUTS = [(0,), (1,), (2,), (3,), (4,), (1, 3), (0, 2, 4)]


@pytest.mark.parametrize("tower", TOWERS, ids=["table", "rotary"])
@pytest.mark.parametrize("cuts", VISION_CUTS)
def test_vision_cut_anywhere_gives_the_same_features_and_gradients(base, cuts, tower):
    whole_output, whole_gradients = run_vision(base, (), tower=tower)
    output, found = run_vision(base, cuts, tower=tower)
    torch.testing.assert_close(output, whole_output, rtol=TOLERANCE, atol=TOLERANCE)
    assert_equal_gradients(found, whole_gradients)


@pytest.mark.parametrize("cuts", LANGUAGE_CUTS)
def test_language_cut_anywhere_gives_the_same_losses_and_gradients(base, cuts):
    whole_losses, whole_gradients = run_language(base, ())
    losses, found = run_language(base, cuts)
    torch.testing.assert_close(losses, whole_losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert_equal_gradients(found, whole_gradients)


def test_rows_rotated_at_once_are_those_that_megatron_rotates_span_by_span(base, monkeypatch):
    losses, found = run_language(base, (1,))

    def without_places(*args, has_places, **options):
        assert has_places
        return span_params(*args, **options)

    monkeypatch.setattr(language, "span_params", without_places)
    expected_losses, expected = run_language(base, (1,))
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("tower", TOWERS, ids=["table", "rotary"])
@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 1, 2)])
def test_recomputed_vision_layers_give_equal_gradients(base, layers, tower):
    output, expected = run_vision(base, (1,), tower=tower)
    recomputed_output, found = run_vision(base, (1,), layers, tower)
    torch.testing.assert_close(recomputed_output, output, rtol=0, atol=0)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_recomputed_language_layers_give_equal_gradients(base, layers):
    losses, expected = run_language(base, (2,))
    recomputed_losses, found = run_language(base, (2,), recompute_layers=layers)
    torch.testing.assert_close(recomputed_losses, losses, rtol=0, atol=0)
    assert_equal_gradients(found, expected)


def test_only_the_named_layers_run_twice(base):
    (stage,) = language_stages(base)
    calls = [0] * LANGUAGE_LAYERS

    def count(layer, *_):
        calls[layer.layer_number - 1] += 1

    for layer in stage.language_model.decoder.layers:
        layer.self_attention.register_forward_hook(lambda module, *_: count(module))
    batch = language_batch()
    with recomputed_layers(stage, [1, 3]):
        losses = stage(None, batch, image_features(batch))
    losses.sum().backward()
    assert calls == [1, 2, 1, 2]


def test_recomputed_layers_after_frozen_ones_still_get_gradients(base):
    def run(recompute_layers):
        (stage,) = language_stages(base)
        stage.language_model.embedding.requires_grad_(False)
        batch = language_batch(images=())
        with recomputed_layers(stage, recompute_layers):
            losses = stage(None, batch)
        losses.sum().backward()
        found = gradients([stage])
        assert found.pop("language_model.embedding.word_embeddings.weight") is None
        return found

    assert_equal_gradients(run([0, 1]), run([]))


@pytest.mark.parametrize("tower", TOWERS, ids=["table", "rotary"])
def test_changing_one_image_leaves_the_others_as_they_were(base, tower):
    (stage,) = vision_stages(base, tower=tower)
    batch, other = vision_batch(tower), vision_batch(tower, seed=1)
    lengths = list(batch.span_lengths)
    pieces = list(batch.patches.split(lengths))
    pieces[2] = other.patches.split(lengths)[2]
    mixed = type(batch)(patches=torch.cat(pieces), grids=batch.grids, items=batch.items)

    before, after = (
        run_chain([stage], each).split([grid.num_tokens for grid in batch.grids])
        for each in (batch, mixed)
    )
    for index in (0, 1, 3):
        torch.testing.assert_close(after[index], before[index], rtol=0, atol=0)
    assert not torch.allclose(after[2], before[2])


@pytest.mark.parametrize("tower", TOWERS, ids=["table", "rotary"])
def test_an_image_alone_gives_the_features_it_gives_among_others(base, tower):
    (stage,) = vision_stages(base, tower=tower)
    batch = vision_batch(tower)
    together = run_chain([stage], batch).split([grid.num_tokens for grid in batch.grids])
    for index, patches in enumerate(batch.patches.split(list(batch.span_lengths))):
        alone = type(batch)(patches=patches, grids=(batch.grids[index],), items=(0,))
        torch.testing.assert_close(
            run_chain([stage], alone), together[index], rtol=TOLERANCE, atol=TOLERANCE
        )


def test_changing_one_sample_leaves_the_losses_of_others_as_they_were(base):
    (stage,) = language_stages(base)
    batch = language_batch(images=())
    start, end = 9, 16
    tokens = batch.tokens.clone()
    tokens[start:end] = (tokens[start:end] + 1) % 64
    changed = type(batch)(**{**vars(batch), "tokens": tokens})

    before, after = (run_chain([stage], each) for each in (batch, changed))
    outside = torch.ones(len(before), dtype=torch.bool)
    outside[start:end] = False
    torch.testing.assert_close(after[outside], before[outside], rtol=0, atol=0)
    assert not torch.allclose(after[start:end], before[start:end])


def test_a_sample_alone_gives_the_losses_it_gives_among_others(base):
    """Also says that rotary positions restart: they would differ otherwise."""
    (stage,) = language_stages(base)
    batch = language_batch(images=())
    together = run_chain([stage], batch).split(list(batch.span_lengths))
    for tokens, labels, losses in zip(
        batch.tokens.split(list(batch.span_lengths)),
        batch.labels.split(list(batch.span_lengths)),
        together,
        strict=True,
    ):
        alone = language_batch((len(tokens),), images=())
        alone = type(batch)(**{**vars(alone), "tokens": tokens, "labels": labels})
        # The loss itself is computed in 32 bits by Megatron.
        torch.testing.assert_close(run_chain([stage], alone), losses, rtol=1e-6, atol=1e-6)


def test_tokens_see_those_before_them_only(base):
    (stage,) = language_stages(base)
    batch = language_batch((20,), images=())
    tokens = batch.tokens.clone()
    tokens[12] = (tokens[12] + 1) % 64
    changed = type(batch)(**{**vars(batch), "tokens": tokens})
    before, after = (run_chain([stage], each) for each in (batch, changed))
    torch.testing.assert_close(after[:12], before[:12], rtol=0, atol=0)
    assert (after[12:] != before[12:]).all()


def test_a_text_only_batch_needs_no_features(base):
    text = language_batch(images=())
    losses, found = run_language(base, (2,), batch=text)
    whole_losses, expected = run_language(base, (), batch=text)
    assert losses.shape == text.tokens.shape
    torch.testing.assert_close(losses, whole_losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert_equal_gradients(found, expected)


def test_image_features_replace_exactly_their_rows(base):
    stage = language_stages(base, (0,))[0]
    batch = language_batch()
    features = image_features(batch)
    embedded = stage(None, batch, features)
    words = stage.language_model.embedding.word_embeddings.weight[batch.tokens]
    is_image = torch.zeros(len(batch.tokens), dtype=torch.bool)
    is_image[batch.image_rows] = True
    torch.testing.assert_close(embedded[is_image], features, rtol=0, atol=0)
    torch.testing.assert_close(embedded[~is_image, 0], words[~is_image], rtol=0, atol=0)


def test_missing_image_features_are_reported(base):
    (stage,) = language_stages(base)
    batch = language_batch()
    with pytest.raises(ValueError, match="0 rows of image features for 13 image rows"):
        stage(None, batch, None)


def test_hidden_states_of_another_batch_are_reported(base):
    stage = language_stages(base, (2,))[1]
    with pytest.raises(ValueError, match="hidden states of 40 rows for 39 tokens"):
        stage(torch.zeros(40, 1, LANGUAGE_HIDDEN, dtype=torch.float64), language_batch())


def test_boundaries_have_the_shapes_that_the_executor_expects(base):
    images, text = vision_batch(), language_batch()
    vision, language = vision_stages(base, (1,)), language_stages(base, (2,))
    size = ItemSize(
        tokens=sum(images.span_lengths),
        spans=images.span_lengths,
        output_tokens=sum(grid.num_tokens for grid in images.grids),
    )
    inner = vision[0](None, images)
    assert inner.shape == Boundary("packed", 32).shape([size], outer=False)
    outer = Boundary("packed", LANGUAGE_HIDDEN)
    assert vision[1](inner, images).shape == outer.shape([size], outer=True)
    inner = language[0](None, text, image_features(text))
    size = ItemSize(tokens=39, spans=(39,))
    assert inner.shape == Boundary("packed", LANGUAGE_HIDDEN).shape([size], outer=False)
    assert language[1](inner, text).shape == (39,)


def test_input_may_be_set_beforehand_as_megatrons_schedules_do(base):
    first, second = language_stages(base, (2,))
    batch = language_batch(images=())
    hidden = first(None, batch)
    expected = second(hidden, batch)
    second.set_input_tensor([hidden])
    torch.testing.assert_close(second(None, batch), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs hidden states"):
        second(None, batch)


@pytest.mark.parametrize("sides", [(2, 2, 2), (6, 4, 2), (10, 2, 1), (12, 16, 4)])
def test_positions_are_those_of_torchs_bilinear_interpolation(sides):
    grid = Grid(*sides)
    table = torch.randn(5, 5, 3, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(
        table.permute(2, 0, 1)[None], size=sides[:2], mode="bilinear", align_corners=False
    )[0]
    coordinates = patch_coordinates(grid)
    expected = expected[:, coordinates[:, 0], coordinates[:, 1]].T
    torch.testing.assert_close(interpolated_positions(table, grid), expected)


def rotated_as_in_qwen2_vl(rows, grid):
    """``[N, heads, d]``, patches group-major: the formula of its vision tower, written anew."""
    side, width = grid.merge_size, rows.shape[-1]
    by_row = torch.arange(grid.rows).unsqueeze(1).expand(-1, grid.columns)
    by_column = torch.arange(grid.columns).unsqueeze(0).expand(grid.rows, -1)
    places = [
        place.reshape(grid.rows // side, side, grid.columns // side, side)
        .permute(0, 2, 1, 3)
        .flatten()
        for place in (by_row, by_column)
    ]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, width // 2, 2).float() / (width // 2))
    table = torch.outer(torch.arange(max(grid.rows, grid.columns)).float(), frequencies)
    angles = torch.cat([table[place] for place in places], dim=1).repeat(1, 2)[:, None, :]
    swapped = torch.cat([-rows[..., width // 2 :], rows[..., : width // 2]], dim=-1)
    return rows * angles.cos() + swapped * angles.sin()


def test_queries_and_keys_turn_by_row_and_column_as_in_qwen2_vl(base):
    (stage,) = vision_stages(base, tower=ROTARY)
    batch, seen = vision_batch(ROTARY), {}
    attention = stage.vision_model.decoder.layers[0].self_attention

    def see(name):
        return lambda _, given, output=None: seen.setdefault(name, output or given)

    attention.linear_qkv.register_forward_hook(see("joint"))
    attention.core_attention.register_forward_pre_hook(see("turned"))
    run_chain([stage], batch)
    joint = seen["joint"][0].detach().view(sum(batch.span_lengths), 4, 3, -1)
    for number, turned in enumerate(seen["turned"][:3]):
        given = joint[:, :, number].split(batch.span_lengths)
        if number < 2:
            pairs = zip(given, batch.grids, strict=True)
            given = [rotated_as_in_qwen2_vl(rows, grid) for rows, grid in pairs]
        # Angles are in 32 bits.
        torch.testing.assert_close(turned.detach(), torch.cat(given), rtol=1e-6, atol=1e-6)


def test_a_tower_that_merges_sixteen_patches_reads_an_image_of_2704(base):
    tower = Tower(merge_size=4, table_side=None)
    (stage,) = vision_stages(base, tower=tower)
    pixels = torch.randint(0, 256, (104, 104, 3), dtype=torch.uint8).numpy()
    grid = choose_grid(104, 104, ImageLimits(2, 4, 1024, 4))
    patches = image_patches(Image.fromarray(pixels), grid, 2)
    assert len(patches) == 2704
    features = run_chain([stage], VisionBatch(patches=patches, grids=(grid,), items=(0,)))
    assert features.shape == (169, 1, LANGUAGE_HIDDEN)
    weighted_sum(features).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients([stage]).values())


def test_layers_outside_of_the_module_are_refused(base):
    with pytest.raises(PartitionError, match=r"layers \[0, 2\) of a module of 1 layers"):
        cut_config(base, Part("language", 0, 2, first=True, last=True))


def test_latent_attention_is_refused_by_name(base):
    stage_config = cut_config(base, Part("language", 0, 1, first=True, last=True))
    stage_config.multi_latent_attention = True
    with pytest.raises(UnsupportedError, match="multi_latent_attention"):
        block_submodules(stage_config, num_layers=1, mask_type=AttnMaskType.causal)


def test_building_stages_does_not_repeat_megatrons_deprecation_notice(base, caplog):
    with caplog.at_level(logging.WARNING):
        language_stages(base)
    assert "DEPRECATED" not in caplog.text


def test_16_bit_stages_hand_on_16_bit_rows_under_megatrons_wrapper():
    base = base_config(torch.bfloat16)
    base.bf16 = True
    images, text = vision_batch(), language_batch()
    vision, language = (
        [Float16Module(stage.config, stage) for stage in stages]
        for stages in (vision_stages(base, (1,)), language_stages(base, (2,)))
    )
    inner = vision[0](None, images, fp32_output=False)
    features = vision[1](inner, images, fp32_output=False)
    hidden = language[0](None, text, features, fp32_output=False)
    assert {inner.dtype, features.dtype, hidden.dtype} == {torch.bfloat16}
    losses = language[1](hidden, text)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert all(
        parameter.grad is not None
        for stage in vision + language
        for parameter in stage.parameters()
    )


def test_one_step_of_both_modules_trains_all_parameters(base):
    """Features flow from vision to language and gradients back."""
    images = vision_batch()
    text = language_batch()
    vision, language = vision_stages(base, (2,)), language_stages(base, (1,))
    losses = run_chain(language, text, run_chain(vision, images))
    (losses * text.loss_mask).sum().backward()
    found = gradients([*vision, *language])
    assert all(gradient is not None for gradient in found.values())
    assert (
        sum(name.endswith("linear_qkv.weight") for name in found) == VISION_LAYERS + LANGUAGE_LAYERS
    )
