"""Stages of the diffusion transformer and its text encoder, in 64 bits, against uncut modules."""

import gc
import weakref

import pytest
import torch
from models_setup import base_config, layers_of, megatron_on_cpu, run_chain

from megatron_dip.costs import Boundary
from megatron_dip.families.packed.configs import make_dit_config, make_language_config
from megatron_dip.families.packed.initialization import (
    initialize_parameters,
    named_global_parameters,
)
from megatron_dip.families.packed.shapes import ROWS_PER_CLIP
from megatron_dip.families.t2v.batches import Clip, ClipMicrobatch
from megatron_dip.families.t2v.dit import DitStage, rotary_frequencies
from megatron_dip.families.t2v.text import TextStage

LAYERS, HIDDEN, VALUES, TEXT_HIDDEN = 4, 48, 8, 32
GRIDS = ((2, 2, 3), (1, 2, 2), (3, 1, 2))
TEXTS = (5, 3, 4)
TOLERANCE = 1e-11


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu():
        yield


@pytest.fixture(scope="module")
def microbatch() -> ClipMicrobatch:
    generator = torch.Generator().manual_seed(3)
    clips = []
    for grid, length in zip(GRIDS, TEXTS, strict=True):
        size = (grid[0] * grid[1] * grid[2], VALUES)
        clips.append(
            Clip(
                tokens=torch.randint(0, 64, (length,), generator=generator),
                grid=grid,
                time=float(torch.rand(1, generator=generator)),
                latents=torch.randn(size, generator=generator, dtype=torch.float64),
                noise=torch.randn(size, generator=generator, dtype=torch.float64),
            )
        )
    return ClipMicrobatch(clips=tuple(clips))


def dit_stages(cuts=()):
    config = make_dit_config(
        base_config(),
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=96,
        num_attention_heads=4,
    )
    stages = []
    for layers in layers_of(cuts, LAYERS):
        stage = DitStage(
            config,
            patch_values=VALUES,
            text_size=TEXT_HIDDEN,
            **layers,
        ).double()
        initialize_parameters(stage, 7)
        stages.append(stage)
    return stages


def text_stages(cuts=()):
    config = make_language_config(
        base_config(),
        num_layers=LAYERS,
        hidden_size=TEXT_HIDDEN,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
    )
    stages = []
    for layers in layers_of(cuts, LAYERS):
        stage = TextStage(
            config,
            vocab_size=64,
            max_sequence_length=16,
            **layers,
        ).double()
        initialize_parameters(stage, 7)
        stages.append(stage)
    return stages


def features_of(num_rows, seed=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, 1, TEXT_HIDDEN)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(stages):
    return {name: p.grad for stage in stages for name, p in named_global_parameters(stage)}


def step(microbatch, cuts=(), recompute_layers=()):
    stages = dit_stages(cuts)
    features = features_of(sum(TEXTS))
    batch = microbatch.sub_batch("dit", range(len(GRIDS)))
    losses = run_chain(stages, batch, features, recompute_layers)
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    return losses.detach(), gradients(stages) | {"text features": features.grad}


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        # A key's bias shifts all scores of a row alike, so that nothing depends on it.
        assert gradient is not None and gradient.abs().max() > 0, f"{name} has no gradient"
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-9, atol=TOLERANCE)


@pytest.fixture(scope="module")
def whole(microbatch):
    return step(microbatch)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (0, 4), (0, 1, 1, 4)])
def test_the_transformer_gives_the_same_wherever_it_is_cut(microbatch, whole, cuts):
    assert_equal(step(microbatch, cuts), whole)


@pytest.mark.parametrize("layers", [(0,), (1, 2, 3)])
def test_recomputed_layers_give_the_same_gradients(microbatch, whole, layers):
    assert_equal(step(microbatch, (2,), layers), whole)


def test_a_clip_has_the_same_losses_alone_as_among_others(microbatch):
    (stage,) = dit_stages()
    features = features_of(sum(TEXTS)).detach()
    joint = stage(None, microbatch.sub_batch("dit", (0, 1, 2)), features)
    sizes = [clip.num_patches for clip in microbatch.clips]
    parts = zip(joint.split(sizes), features.split(list(TEXTS)), strict=True)
    for number, (losses, own_features) in enumerate(parts):
        alone = stage(None, microbatch.sub_batch("dit", (number,)), own_features)
        torch.testing.assert_close(alone, losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [0, 1, 2])
def test_a_clip_reads_its_own_text_alone(microbatch, clip):
    (stage,) = dit_stages()
    batch = microbatch.sub_batch("dit", (0, 1, 2))
    features = features_of(sum(TEXTS)).detach()
    before = stage(None, batch, features)
    start = sum(TEXTS[:clip])
    features[start : start + TEXTS[clip]] += 1.0
    changed = (stage(None, batch, features) - before).abs() > 1e-9
    sizes = [one.num_patches for one in microbatch.clips]
    assert [bool(part.all()) for part in changed.split(sizes)] == [n == clip for n in range(3)]
    assert [bool(part.any()) for part in changed.split(sizes)] == [n == clip for n in range(3)]


def test_the_boundary_has_the_shape_that_receivers_expect(microbatch):
    stages = dit_stages((2,))
    batch = microbatch.sub_batch("dit", (0, 2))
    output = stages[0](None, batch, features_of(TEXTS[0] + TEXTS[2]))
    sizes = [microbatch.item_sizes["dit"][item] for item in (0, 2)]
    rule = Boundary("packed", HIDDEN, extra_rows=ROWS_PER_CLIP, carries_context=True)
    assert (
        output.shape == rule.shape(sizes, outer=False) == (18 + TEXTS[0] + TEXTS[2] + 14, 1, HIDDEN)
    )
    with pytest.raises(ValueError, match=r"expected 41: 18 of patches .* 9 of text and 7 for"):
        stages[1](output[:-1], batch)


def test_text_of_another_length_than_the_captions_is_refused(microbatch):
    with pytest.raises(ValueError, match="11 rows of text features for 12 tokens"):
        dit_stages()[0](None, microbatch.sub_batch("dit", (0, 1, 2)), features_of(11))


def test_rotary_angles_tell_frames_rows_and_columns_apart():
    angles = rotary_frequencies([(2, 3, 4)], 12).reshape(2, 3, 4, 2, 6)
    assert torch.equal(angles[..., 0, :], angles[..., 1, :])
    of_frame, of_row, of_column = angles[..., 0, :].split(2, dim=-1)
    for part, axis in ((of_frame, 0), (of_row, 1), (of_column, 2)):
        assert part.movedim(axis, 0)[1, 0, 0].tolist() == pytest.approx([1.0, 0.01])
        assert torch.equal(part, part.movedim(axis, 0)[:, :1, :1].movedim(0, axis).expand_as(part))


@pytest.mark.parametrize("cuts", [(2,), (0, 1, 4)])
def test_the_text_encoder_gives_the_same_wherever_it_is_cut(microbatch, cuts):
    batch = microbatch.sub_batch("text", (0, 1, 2))
    whole, cut = run_chain(text_stages(), batch), run_chain(text_stages(cuts), batch)
    assert whole.shape == (sum(TEXTS), 1, TEXT_HIDDEN)
    torch.testing.assert_close(cut, whole, rtol=TOLERANCE, atol=TOLERANCE)
    # The final norm: every row has mean square one.
    torch.testing.assert_close(
        whole.square().mean(-1), torch.ones_like(whole[..., 0]), rtol=1e-3, atol=0
    )


def test_captions_do_not_read_each_other(microbatch):
    (stage,) = text_stages()
    joint = stage(None, microbatch.sub_batch("text", (0, 1, 2)))
    alone = stage(None, microbatch.sub_batch("text", (1,)))
    torch.testing.assert_close(joint[5:8], alone, rtol=0, atol=1e-12)


def kept_bytes(stage, batch, *, trainable):
    """What autograd keeps of a forward, as the executor runs it, and what is alive after it."""
    stage.requires_grad_(trainable)
    kept, outputs = [], []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output[0])))
        for layer in stage.language_model.decoder.layers
    ]

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with (
        torch.set_grad_enabled(trainable),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = stage(None, batch)
    for hook in hooks:
        hook.remove()
    gc.collect()
    alive = [reference() is not None for reference in outputs]
    return sum(kept), sum(alive), output


def test_a_frozen_encoder_keeps_nothing_of_its_forward(microbatch):
    (stage,) = text_stages()
    batch = microbatch.sub_batch("text", (0, 1, 2))
    frozen_bytes, frozen_alive, frozen = kept_bytes(stage, batch, trainable=False)
    trained_bytes, _, trained = kept_bytes(stage, batch, trainable=True)
    print(f"kept for backward: frozen {frozen_bytes} bytes, trained {trained_bytes}")
    assert frozen_bytes == 0 and frozen_alive == 0
    assert trained_bytes > 20 * sum(TEXTS) * TEXT_HIDDEN * 8
    torch.testing.assert_close(frozen, trained.detach(), rtol=0, atol=0)
