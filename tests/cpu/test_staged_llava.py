"""Stages of ``LLaVAModel`` against the model in one piece, in one process."""

import copy
import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hybrid_setup import local_stack
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.multimodal.llava_model import (
    DEFAULT_IMAGE_TOKEN_INDEX,
    IGNORE_INDEX,
    LLaVAModel,
)
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision import radio
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from models_setup import base_config, megatron_on_cpu
from staged_loop import RUN, Setting, assert_same, run_stages, run_whole

from megatron_dip.errors import UnsupportedError
from megatron_dip.models.llava import StagedLlava
from megatron_dip.models.staged import Part

VISION_LAYERS, LANGUAGE_LAYERS = 3, 2
IMAGE_SIZE, PATCH_SIZE = 8, 2
NUM_TOKENS, MAX_TOKENS = 10, 48
VOCABULARY = 64
PAD = 0
# Losses are made in 32 bits.
SPLIT = {"tolerance": 1e-6, "loss_tolerance": 1e-6}
CUTS = [
    {"vision": (3,), "language": (2,)},
    {"vision": (1, 2), "language": (1, 1)},
    {"vision": (0, 2, 1, 0), "language": (0, 2, 0)},
]


@pytest.fixture(scope="module", autouse=True)
def _megatron():
    with megatron_on_cpu(), pytest.MonkeyPatch.context() as patch:
        norms = (WrappedTorchNorm, WrappedTorchNorm, *CLIPViTModel.__init__.__defaults__[2:])
        patch.setattr(CLIPViTModel.__init__, "__defaults__", norms)
        patch.setattr(hybrid_block, "TENorm", WrappedTorchNorm)
        yield


def config(num_layers, hidden_size, **fields):
    made = base_config()
    made.num_layers, made.hidden_size, made.ffn_hidden_size = num_layers, hidden_size, 64
    made.num_attention_heads = made.num_query_groups = 4
    made.kv_channels = hidden_size // 4
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def setting(tower="clip", prepare=None, **arguments):
    spec = decoder_model_with_local_default_spec()
    language = config(LANGUAGE_LAYERS, 48, language_model_type="")
    given = {
        "language_transformer_config": language,
        "language_transformer_layer_spec": spec,
        "language_vocab_size": VOCABULARY,
        "language_max_sequence_length": MAX_TOKENS,
        "vision_transformer_config": config(VISION_LAYERS, 32, vision_model_type=tower),
        "vision_transformer_layer_spec": get_vit_layer_with_local_spec(),
        "drop_vision_class_token": tower == "clip",
        "vision_projection_config": copy.deepcopy(language),
        "vision_projection_layer_spec": get_submodules(spec.submodules.mlp),
        "language_position_embedding_type": "rope",
        "img_h": IMAGE_SIZE,
        "img_w": IMAGE_SIZE,
        "patch_dim": PATCH_SIZE,
        **arguments,
    }
    return Setting(LLaVAModel, StagedLlava, given, step, prepare or pad_to_the_longest)


def pad_to_the_longest(model):
    """As a model does that believes in a pipeline: the one in stages does, whatever its ranks."""
    model._language_is_pipeline_parallel = True


def step(iterator, model):
    """As that of ``pretrain_vlm.py``."""
    batch = next(iterator)
    images = batch["image"]
    output, loss_mask = model(
        None if images is None else images.double(),
        batch["tokens"],
        batch["position_ids"],
        None,
        batch["labels"],
        batch["loss_mask"],
        num_image_tiles=batch.get("num_tiles"),
    )
    return output, partial(loss, loss_mask)


def loss(loss_mask, output):
    return (output.double() * loss_mask).sum(), loss_mask.sum()


def raw_batch(images=((2,), (5,)), num_tiles=None, image_size=IMAGE_SIZE):
    """Sequences with image tokens at the places that ``images`` names."""
    generator = torch.Generator().manual_seed(3)
    num_samples = len(images)
    tokens = torch.randint(0, VOCABULARY, (num_samples, NUM_TOKENS + 1), generator=generator)
    for sample, places in enumerate(images):
        tokens[sample, list(places)] = DEFAULT_IMAGE_TOKEN_INDEX
    labels = tokens[:, 1:].clamp(min=0)
    num_images = sum(map(len, images))
    total = num_images if num_tiles is None else sum(num_tiles)
    loss_mask = torch.ones(num_samples, NUM_TOKENS)
    loss_mask[0, -2:] = 0
    batch = {
        "tokens": tokens[:, :-1],
        "labels": labels,
        "loss_mask": loss_mask,
        "position_ids": torch.arange(NUM_TOKENS).expand(num_samples, -1),
        "image": torch.randn(total, 3, image_size, image_size, generator=generator),
    }
    if num_tiles is not None:
        batch["num_tiles"] = torch.tensor(num_tiles, dtype=torch.int32)
    return batch


@pytest.mark.parametrize("cuts", CUTS)
def test_stages_give_the_losses_and_gradients_of_the_whole_model(cuts):
    given, batch = setting(), raw_batch()
    assert_same(run_stages(given, batch, cuts), run_whole(given, batch), tolerance=1e-12)


@pytest.mark.parametrize("groups", [[(0,), (1,)], [(1,), (0,)]])
def test_images_and_sequences_can_be_sub_microbatches(groups):
    given, batch = setting(), raw_batch()
    parts = {"vision": groups, "language": [(0,), (1,)]}
    ours = run_stages(given, batch, CUTS[1], parts)
    assert_same(ours, run_whole(given, batch), **SPLIT)


def test_tiles_are_items_and_a_sequence_reads_those_of_its_images():
    given, batch = setting(), raw_batch(images=((1, 4), (), (7,)), num_tiles=(1, 1, 2))
    parts = {"vision": [(0, 3), (1, 2)], "language": [(0, 1), (2,)]}
    ours = run_stages(given, batch, CUTS[1], parts)
    assert_same(ours, run_whole(given, batch), **SPLIT)


def test_a_microbatch_of_text_alone_needs_no_tower():
    given, batch = setting(), raw_batch(images=((), ()))
    ours = run_stages(given, batch, CUTS[1])
    assert ours.gradients["vision_model.conv1.weight"] is None
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_sequences_that_are_too_long_lose_their_last_tokens_and_their_losses():
    given, batch = setting(language_max_sequence_length=20), raw_batch()
    assert_same(run_stages(given, batch, CUTS[1]), run_whole(given, batch), tolerance=1e-12)


@pytest.mark.parametrize(
    ("tower", "arguments"),
    [
        ("clip", {"drop_vision_class_token": False}),
        ("clip", {"pixel_shuffle": True}),
        ("siglip", {"pixel_shuffle": True}),
        ("internvit", {"drop_vision_class_token": True}),
    ],
)
def test_towers_and_what_follows_them(tower, arguments):
    given, batch = setting(tower, **arguments), raw_batch()
    assert_same(run_stages(given, batch, CUTS[2]), run_whole(given, batch), tolerance=1e-12)


@pytest.mark.parametrize("drops", [True, False])
def test_radio_draws_positions_in_the_first_stage_alone(monkeypatch, drops):
    monkeypatch.setattr(radio, "HAVE_EINOPS", True)
    monkeypatch.setattr(radio, "rearrange", patches_of, raising=False)

    def prepare(model):
        pad_to_the_longest(model)
        torch.manual_seed(5)

    # Its table of positions is for images of 2048 pixels.
    size = {"img_h": 64, "img_w": 64, "patch_dim": 32}
    given = setting("radio", prepare, drop_vision_class_token=drops, **size)
    batch = raw_batch(image_size=64)
    assert_same(run_stages(given, batch, CUTS[2]), run_whole(given, batch), tolerance=1e-12)


def patches_of(pixels, pattern, *, py, yy, px, xx):
    """What ``einops.rearrange`` does for the one pattern that RADIO asks for."""
    assert pattern == "b c (py yy) (px xx) -> b (py px) (c yy xx)"
    patches = pixels.reshape(*pixels.shape[:2], py, yy, px, xx).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(len(pixels), py * px, -1)


@pytest.mark.parametrize("frozen", ["language_model", "vision_model", "vision_projection"])
def test_what_a_script_freezes_is_frozen_in_every_stage(frozen):
    def prepare(model):
        pad_to_the_longest(model)
        names = ("language_model", "vision_model", "vision_projection")
        model.freeze(**{f"freeze_{name}": name == frozen for name in names})

    given, batch = setting(prepare=prepare), raw_batch()
    ours = run_stages(given, batch, CUTS[1])
    assert {name for name, trained in ours.trained.items() if not trained} == {
        name for name in ours.trained if name.startswith(frozen)
    }
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_ranks_between_the_first_and_the_last_need_no_data():
    given, batch = setting(), raw_batch(num_tiles=(1, 2))
    nothing = dict.fromkeys(batch)

    def without_data(part):
        if part.module == "vision":
            return None if part.first else dict(nothing)
        if part.last:
            return {**batch, "image": None}
        return None if part.first else dict(nothing)

    cuts = {"vision": (1, 1, 1), "language": (1, 0, 1)}
    ours = run_stages(given, batch, cuts, without_data=without_data)
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_a_hybrid_language_model_is_cut_too():
    given = setting()
    language = given.arguments["language_transformer_config"]
    language.language_model_type = "nemotron5-hybrid-8b"
    language.num_layers = 4
    stack = {"language_transformer_layer_spec": local_stack(), "hybrid_layer_pattern": "*-*-"}
    given, batch = given._replace(arguments=given.arguments | stack), raw_batch()
    ours = run_stages(given, batch, {"vision": (1, 2), "language": (1, 2, 0, 1)})
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_recomputed_layers_give_equal_gradients():
    given, batch = setting(), raw_batch()
    ours = run_stages(given, batch, CUTS[1], recompute=(0, 1))
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def test_layers_that_were_on_the_host_give_equal_gradients():
    given, batch = setting(), raw_batch()
    ours = run_stages(given, batch, CUTS[1], recompute=(0,), offload=(1, 2, 3))
    assert_same(ours, run_whole(given, batch), tolerance=1e-12)


def example_batch(images=((1, 4), (), (7,)), num_tiles=(1, 1, 2)):
    """As ``examples/multimodal`` has it: a label more, no mask, and two by two for no images."""
    batch = raw_batch(images, num_tiles)
    pixels = batch.pop("image")
    del batch["loss_mask"], batch["position_ids"]
    labels = torch.cat([batch["tokens"][:, :1].clamp(min=0), batch["labels"]], dim=1)
    labels[0, 1] = IGNORE_INDEX
    labels[2, -1] = PAD
    nothing = torch.zeros(1, 1, dtype=torch.int32)
    return {
        **batch,
        "labels": labels,
        "imgs": pixels if len(pixels) else torch.zeros(1, 1),
        "num_tiles": batch["num_tiles"] if num_tiles else nothing,
        "cu_lengths": nothing,
        "max_lengths": nothing,
        "__key__": ["a", "b", "c"],
    }


def test_batches_of_the_multimodal_example_are_divided_with_their_tiles(monkeypatch):
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: SimpleNamespace(pad=PAD))
    staged, batch = StagedLlava(bound(), RUN), example_batch()
    sizes = staged.items(batch)
    assert [size.output_tokens for size in sizes["vision"]] == [16] * 4
    assert [size.needs["vision"] for size in sizes["language"]] == [(0, 1), (), (2, 3)]
    assert [size.loss_tokens for size in sizes["language"]] == [10 - 2 - 2 - 1, 10, 10 - 1 - 1 - 1]
    language, text = Part("language", 0, 1, True, False), (1,)
    part = staged.part_of(batch, language, (0, 2))
    assert part["imgs"].shape == (4, 1, 1, 1) and part["num_tiles"].tolist() == [1, 1, 2]
    assert torch.equal(part["labels"], batch["labels"][[0, 2]])
    part = staged.part_of(batch, language, text)
    assert part["imgs"].shape == part["num_tiles"].shape == (1, 1)
    part = staged.part_of(batch, Part("vision", 0, 1, True, False), (1, 2))
    assert torch.equal(part["imgs"], batch["imgs"][1:3])
    part = staged.part_of(batch, Part("vision", 1, 1, False, False), (1, 2))
    assert part["imgs"].shape == (2, 1, 1, 1)


def test_a_microbatch_of_the_multimodal_example_may_be_text_alone(monkeypatch):
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: SimpleNamespace(pad=PAD))
    staged, batch = StagedLlava(bound(), RUN), example_batch(((), (), ()), ())
    assert staged.items(batch)["vision"] == ()
    assert staged.part_of(batch, Part("language", 0, 1, True, False), (0, 1))["imgs"].shape == (
        1,
        1,
    )


def test_packed_sequences_are_spans_of_their_own(monkeypatch):
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: SimpleNamespace(pad=PAD))
    batch = example_batch() | {"cu_lengths": torch.tensor([[0, 20, 33, 48]])}
    size = StagedLlava(bound(), RUN).items(batch)["language"][0]
    assert (size.tokens, size.spans) == (MAX_TOKENS, (20, 13, 15))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"tile_tags": [[1]]}, "tile tags"), ({"dynamic_resolution": True}, "dynamic resolution")],
)
def test_what_stages_cannot_do_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(UnsupportedError, match=reason):
        StagedLlava(bound(**arguments), RUN).modules()


def bound(**arguments):
    given = inspect.signature(LLaVAModel.__init__).bind(None, **setting(**arguments).arguments)
    given.apply_defaults()
    return given.arguments
