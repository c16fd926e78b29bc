"""LaVIN's towers in 64 bits: size, start, gates, batching, recomputation, cuts."""

from dataclasses import replace

import pytest
import torch
from lavin_setup import (
    LANGUAGE_LAYERS,
    SIZE,
    VISION_LAYERS,
    clip_stages,
    gradients,
    language_stages,
    loss_of,
    microbatch,
    move_adapters,
    published_stages,
    sample,
    step,
)
from models_setup import base_config, megatron_on_cpu, run_chain
from torch.nn.functional import dropout, softmax

from megatron_dip.families.lavin.adapter import AdapterOptions, RoutedAdapter, Routing
from megatron_dip.families.lavin.batches import LavinMicrobatch
from megatron_dip.families.lavin.stages import trainable_parameters
from megatron_dip.families.packed.configs import make_language_config
from megatron_dip.families.packed.initialization import initialize_parameters
from megatron_dip.families.packed.language import LanguageStage

TOLERANCE = 1e-12
# Megatron computes the loss in 32 bits whatever the model's precision is.
LOSS_TOLERANCE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


@pytest.fixture(scope="module")
def base(_megatron):
    return base_config()


def assert_equal(ours, theirs, tolerance=TOLERANCE):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} has no gradient"
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=tolerance * scale)


def adapters_of(stage):
    return [
        layer.input_layernorm.adapter
        for part in (getattr(stage, "vision_model", None), getattr(stage, "language_model", None))
        if part is not None
        for layer in part.decoder.layers
    ]


@pytest.mark.parametrize(
    ("shape", "trainable"),
    [((4096, 32, 11008, 32), 3_781_296), ((5120, 40, 13824, 40), 5_390_080)],
    ids=["7B", "13B"],
)
def test_the_published_models_have_exactly_the_published_number_of_tuned_parameters(
    shape, trainable
):
    stages = published_stages(*shape)
    devices = {parameter.device.type for stage in stages for parameter in stage.parameters()}
    assert devices == {"meta"}
    assert trainable_parameters(stages) == trainable


def make_adapter(hidden=12, **options):
    adapter = RoutedAdapter(
        hidden,
        AdapterOptions(**options),
        dtype=torch.float64,
        sequence_parallel=False,
        tensor_group=torch.distributed.group.WORLD,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return adapter


def test_the_adapter_is_what_its_formula_says():
    hidden, narrow = 12, 4
    adapter = make_adapter(hidden, bottleneck=8, temperature=5.0, dropout=0.1, scale=0.7)
    z = torch.randn(6, 1, hidden, dtype=torch.float64)
    adapter.routing = Routing(
        source_rows=torch.tensor([0, 3]), gate_of_row=torch.tensor([0, 0, 1, 1, 1, 0])
    )
    torch.manual_seed(0)
    output = adapter(z)
    torch.manual_seed(0)
    rows = z.squeeze(1)
    u = dropout(rows @ adapter.down.weight.T + adapter.down.bias, 0.1)
    expected = []
    for row, source in enumerate((0, 0, 3, 3, 3, 0)):
        w = softmax((adapter.router.weight @ rows[source] + adapter.router.bias) / 5.0, dim=0)
        z_new = rows[row].clone()
        for expert in range(2):
            upper = adapter.up.weight[expert, : hidden // 2] @ u[row, :narrow]
            lower = adapter.up.weight[expert, hidden // 2 :] @ u[row, narrow:]
            z_new += 0.7 * w[expert] * (torch.cat([upper, lower]) + adapter.up.bias[expert])
        expected.append(z_new)
    torch.testing.assert_close(output.squeeze(1), torch.stack(expected), rtol=1e-13, atol=1e-13)


def test_an_adapter_whose_rows_nobody_named_is_refused():
    with pytest.raises(RuntimeError, match="recompute-modules"):
        make_adapter()(torch.zeros(2, 1, 12, dtype=torch.float64))


def plain_losses(base, batch, features):
    """Of the backbone without adapters and without modality rows."""
    config = make_language_config(
        base,
        num_layers=LANGUAGE_LAYERS,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=4,
    )
    stage = LanguageStage(
        config,
        first_layer=0,
        num_layers=LANGUAGE_LAYERS,
        first=True,
        last=True,
        vocab_size=64,
        max_sequence_length=64,
    ).to(torch.float64)
    initialize_parameters(stage, 11)
    kept = torch.ones(batch.num_tokens, dtype=torch.bool)
    kept[batch.modality_rows] = False
    places = kept.cumsum(0) - 1
    bare = replace(
        batch,
        tokens=batch.tokens[kept],
        labels=batch.labels[kept],
        position_ids=batch.position_ids[kept],
        loss_mask=batch.loss_mask[kept],
        span_lengths=tuple(length for length in batch.span_lengths if length > 1),
        image_rows=places[batch.image_rows],
    )
    return stage(None, bare, features), kept


def test_towers_with_fresh_adapters_are_the_towers_without(base):
    (vision,), (language,) = clip_stages(base), language_stages(base)
    batch = microbatch()
    text = batch.sub_batch("language", range(4))
    features = vision(None, batch.clip_batch(range(3)))
    losses = language(None, text, features)
    neck = language.adapter_neck(features.squeeze(1))
    expected, kept = plain_losses(base, text, neck)
    torch.testing.assert_close(losses[kept], expected, rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE)
    for adapter in adapters_of(vision) + adapters_of(language):
        adapter.routing = Routing()
        rows = torch.randn(5, 1, adapter.down.in_features, dtype=torch.float64)
        assert torch.equal(adapter(rows), rows)
    move_adapters([vision])
    assert not torch.equal(vision(None, batch.clip_batch(range(3))), features)


def test_in_the_first_step_only_up_projections_and_neck_have_gradients(base):
    _, found = step(base, microbatch(), moved=False)
    for name, gradient in found.items():
        moves = ".up." in name or "neck" in name
        assert (gradient.abs().max() > 0) == moves, name
    assert sum(".up." in name for name in found) == 2 * (VISION_LAYERS + LANGUAGE_LAYERS)


def test_all_but_the_adapters_is_frozen(base):
    stages = [*clip_stages(base), *language_stages(base)]
    losses = loss_of(stages[:1], stages[1:], microbatch())
    losses.sum().backward()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert (parameter.grad is not None) == ("adapter" in name), name


def record_gates(language):
    """Per layer the gates ``[R, 2]`` of every call."""
    seen = []
    for adapter in adapters_of(language):
        original = adapter.gates
        adapter.gates = lambda rows, original=original: seen.append(original(rows)) or seen[-1]
    return seen


def test_gates_are_the_same_for_all_samples_of_a_modality(base):
    vision, language = clip_stages(base), language_stages(base)
    move_adapters([*vision, *language])
    seen = record_gates(language[0])
    for lengths in ((14, 11, 17, 12), (20, 9, 13, 15)):
        loss_of(vision, language, microbatch(lengths))
    assert len(seen) == 2 * LANGUAGE_LAYERS
    for first, second in zip(seen[:LANGUAGE_LAYERS], seen[LANGUAGE_LAYERS:], strict=True):
        image, text = first[0], first[1]
        assert (image - text).abs().max() > 1e-6
        for gates, expected in zip(first, (image, text, image, image), strict=True):
            assert torch.equal(gates, expected)
        assert torch.equal(first, second)


def losses_of_samples(base, batch, gates="token"):
    """Per sequence, the sum of its losses and the gradients of the sum over all."""
    vision, language = clip_stages(base, gates=gates), language_stages(base)
    move_adapters([*vision, *language])
    losses = loss_of(vision, language, batch)
    losses.sum().backward()
    sizes = [sequence.num_rows for sequence in batch.sequences]
    sums = torch.stack([part.sum() for part in losses.detach().split(sizes)])
    return sums, gradients([*vision, *language])


def test_losses_and_gradients_do_not_depend_on_order_and_batching(base):
    batch = microbatch()
    together, expected = losses_of_samples(base, batch)
    order = [2, 0, 3, 1]
    turned = replace(batch, sequences=tuple(batch.sequences[i] for i in order))
    shuffled, shuffled_gradients = losses_of_samples(base, turned)
    torch.testing.assert_close(shuffled, together[order], rtol=LOSS_TOLERANCE, atol=0)
    assert_equal(shuffled_gradients, expected, 1e-6)
    summed = None
    for number, sequence in enumerate(batch.sequences):
        (alone,), own = losses_of_samples(base, replace(batch, sequences=(sequence,)))
        torch.testing.assert_close(alone, together[number], rtol=LOSS_TOLERANCE, atol=0)
        own = {n: torch.zeros_like(expected[n]) if g is None else g for n, g in own.items()}
        summed = own if summed is None else {name: summed[name] + own[name] for name in own}
    assert_equal(summed, expected, 1e-6)


def test_samples_packed_into_one_sequence_keep_their_losses(base):
    batch = microbatch()
    apart, expected = losses_of_samples(base, batch)
    joined = batch.sub_batch("language", range(4))
    first = torch.tensor([sequence.num_rows for sequence in batch.sequences]).cumsum(0)
    order = [0, *first[:-1].tolist()]
    rest = [row for row in range(joined.num_tokens) if row not in order]
    index = torch.tensor(order + rest)
    places = torch.empty_like(index)
    places[index] = torch.arange(len(index))
    packed = replace(
        batch.sequences[0],
        tokens=joined.tokens[index],
        labels=joined.labels[index],
        weights=joined.loss_mask[index],
        num_loss_units=20,
        sample_lengths=tuple(s.sample_lengths[0] for s in batch.sequences),
        modalities=tuple(s.modalities[0] for s in batch.sequences),
        image_rows=places[joined.image_rows],
        images=batch.images,
        has_features=(True,) * 3,
    )
    (total,), found = losses_of_samples(base, replace(batch, sequences=(packed,)))
    torch.testing.assert_close(total, apart.sum(), rtol=LOSS_TOLERANCE, atol=0)
    assert_equal(found, expected, 1e-6)


def features_of(base, images, gates):
    stages = clip_stages(base, gates=gates)
    move_adapters(stages)
    pixels = tuple(sample(12, True, seed)[1] for seed in images)
    sequence = replace(sample(12, True, 0)[0], images=pixels, has_features=(True,) * len(images))
    batch = LavinMicrobatch(sequences=(sequence,), image_size=SIZE)
    output = run_chain(stages, batch.clip_batch(range(len(images))))
    return output.view(len(images), SIZE.num_features, -1)


@pytest.mark.parametrize(("gates", "depends"), [("token", 0), ("cls", 0), ("public_code", 1)])
def test_only_under_the_released_router_do_features_depend_on_the_first_image(base, gates, depends):
    alone = features_of(base, [2], gates)
    behind = features_of(base, [1, 2], gates)
    ahead = features_of(base, [2, 1], gates)
    torch.testing.assert_close(ahead[0], alone[0], rtol=1e-12, atol=1e-12)
    assert ((behind[1] - alone[0]).abs().max() > 1e-6) == bool(depends)
    token = features_of(base, [2], "token")
    # The released router equals the default for one image; gates of the class row equal neither.
    assert torch.allclose(alone, token, rtol=0, atol=1e-12) == (gates != "cls")


def test_leaving_images_out_that_no_sample_reads_changes_nothing(base):
    """The released code runs the tower on an empty image for every sample of text."""
    batch = microbatch()
    blank = torch.zeros(SIZE.num_patches, SIZE.values_per_patch)
    text = replace(batch.sequences[1], images=(blank,), has_features=(False,))
    with_blank = replace(
        batch, sequences=(batch.sequences[0], text, batch.sequences[2], batch.sequences[3])
    )
    assert len(with_blank.images) == 4 and with_blank.needs[1] == ()
    losses, expected = losses_of_samples(base, with_blank)
    skipped, found = losses_of_samples(base, batch)
    assert torch.equal(skipped, losses)
    assert_equal(found, expected)
    only_text = replace(batch, sequences=(batch.sequences[1],))
    alone, own = losses_of_samples(base, only_text)
    torch.testing.assert_close(alone[0], losses[1], rtol=LOSS_TOLERANCE, atol=0)
    assert all(own[name] is None for name in own if name.startswith("vision_model"))


ALL = (range(VISION_LAYERS), range(LANGUAGE_LAYERS))


@pytest.mark.parametrize("recompute", [((0,), (0,)), ((1, 3), (2,)), ALL])
def test_recomputed_layers_give_the_same_gradients(base, recompute):
    losses, expected = step(base, microbatch())
    again, found = step(base, microbatch(), recompute=recompute)
    assert torch.equal(again, losses)
    assert_equal(found, expected)


def test_megatrons_own_recomputation_gives_the_same_gradients_in_the_first_clip_block_too(base):
    expected = step(base, microbatch())[1]
    config = replace(
        base,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        distribute_saved_activations=False,
    )
    assert_equal(step(config, microbatch())[1], expected)


def test_text_only_batches_recompute_the_first_language_layer_as_well(base):
    batch = microbatch((14, 11), (False, False))
    expected = {n: g for n, g in step(base, batch)[1].items() if g is not None}
    found = step(base, batch, recompute=((), (0,)))[1]
    used = {name: found[name] for name in expected}
    assert any(name.startswith("language_model.decoder.layers.0.") for name in used)
    neck = [name for name in expected if "neck" in name]
    assert not neck
    assert_equal(used, expected)


@pytest.mark.parametrize("cuts", [((0,), (0,)), ((1, 3), (2,)), ((4,), (4,)), ((0, 2), (1, 3))])
def test_towers_cut_anywhere_give_the_same_losses_and_gradients(base, cuts):
    losses, expected = step(base, microbatch())
    cut_losses, found = step(base, microbatch(), cuts=cuts)
    torch.testing.assert_close(cut_losses, losses, rtol=LOSS_TOLERANCE, atol=0)
    assert_equal(found, expected, 1e-6)


@pytest.mark.parametrize("gates", ["cls", "public_code"])
def test_other_routers_can_be_cut_as_well(base, gates):
    losses, expected = step(base, microbatch(), gates=gates)
    cut_losses, found = step(base, microbatch(), gates=gates, cuts=((1, 3), (2,)))
    torch.testing.assert_close(cut_losses, losses, rtol=LOSS_TOLERANCE, atol=0)
    assert_equal(found, expected, 1e-6)
