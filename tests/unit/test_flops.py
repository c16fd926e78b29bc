"""Operations of a batch against a count by hand."""

from dataclasses import replace

import pytest
from cost_cases import causal, dit, item, vit

from megatron_dip.costs.flops import batch_flops
from megatron_dip.costs.shapes import ModelShape, ProjectorShape
from megatron_dip.costs.trained_parts import LayerChoice

PROJECTOR = ProjectorShape(intermediate_size=32, output_size=8)
TOKENS, PATCHES = 40, 16

# By hand, forward, with two operations per weight and token (see cost_cases for the weights):
# a language layer has 576 weights, and 4 x 8 x 40^2 / 2 operations in its causal attention;
LAYER = 2 * 576 * TOKENS
CORE = 4 * 8 * TOKENS**2 / 2
HEAD = 2 * 8 * 64 * TOKENS
# a vision layer has 768 weights, and 4 x 8 x 16^2 in attention over one image;
VISION_LAYER = 2 * 768 * PATCHES
VISION_CORE = 4 * 8 * PATCHES**2
PATCH_EMBEDDING = 2 * 12 * 8 * PATCHES
# four rows of 8 are joined for the projector's 32 x 32 and 32 x 8 weights.
PROJECTOR_IN = 2 * 32 * 32 * PATCHES // 4
PROJECTOR_OUT = 2 * 32 * 8 * PATCHES // 4


def model(vision=True, language=True) -> ModelShape:
    return ModelShape(
        name="vlm",
        modules=(
            vit(projector=PROJECTOR, trainable=vision),
            causal(upstream=("vision",), trainable=language),
        ),
    )


TEXT = {"language": [item(TOKENS)]}
IMAGES = {"language": [item(TOKENS)], "vision": [item(PATCHES), item(PATCHES)]}
LANGUAGE_FORWARD = 2 * (LAYER + CORE) + HEAD
# A linear layer's backward is its forward twice, once per gradient; so is that of a core.
LANGUAGE = 3 * LANGUAGE_FORWARD
VISION_FORWARD = PATCH_EMBEDDING + 2 * (VISION_LAYER + VISION_CORE) + PROJECTOR_IN + PROJECTOR_OUT


def test_a_batch_of_text_is_the_language_module_alone():
    assert batch_flops(model(), [TEXT]) == LANGUAGE
    assert batch_flops(model(), [TEXT, TEXT]) == 2 * LANGUAGE


def test_images_count_with_all_that_is_done_to_them():
    # Nobody wants the gradient of pixels.
    vision = 3 * VISION_FORWARD - PATCH_EMBEDDING
    assert batch_flops(model(), [IMAGES]) == LANGUAGE + 2 * vision
    assert batch_flops(model(), [TEXT, IMAGES]) == 2 * LANGUAGE + 2 * vision


def test_a_frozen_tower_has_forwards_alone():
    assert batch_flops(model(vision=False), [IMAGES]) == LANGUAGE + 2 * VISION_FORWARD


def test_a_frozen_reader_passes_gradients_on():
    frozen = LANGUAGE - 2 * LAYER - HEAD
    vision = 3 * VISION_FORWARD - PATCH_EMBEDDING
    assert batch_flops(model(language=False), [IMAGES]) == frozen + 2 * vision


def test_a_projector_alone_adds_its_own_backward():
    frozen = LANGUAGE - 2 * LAYER - HEAD
    # Its weights' gradients, and that of the input of its second layer.
    projector = PROJECTOR_IN + 2 * PROJECTOR_OUT
    found = batch_flops(model(vision=("projector",), language=False), [IMAGES])
    assert found == frozen + 2 * (VISION_FORWARD + projector)


def test_last_layers_have_backwards_and_what_follows_them():
    some = model(vision={"layers": LayerChoice(last=1)})
    layer = 2 * VISION_LAYER + 2 * VISION_CORE
    # The projector hands the gradient on but has none of its own.
    projector = PROJECTOR_IN + PROJECTOR_OUT
    assert batch_flops(some, [IMAGES]) == LANGUAGE + 2 * (VISION_FORWARD + layer + projector)


@pytest.mark.parametrize("spans", [(TOKENS,), (TOKENS // 2, TOKENS // 2)])
def test_attention_is_inside_spans(spans):
    core = sum(4 * 8 * span**2 / 2 for span in spans)
    whole = 3 * (2 * (LAYER + core) + HEAD)
    assert batch_flops(model(), [{"language": [item(*spans)]}]) == whole


def test_a_caption_counts_in_the_transformer_that_reads_it():
    text = causal(name="text", has_head=False, trainable=False)
    shape = ModelShape(name="t2v", modules=(text, dit(upstream=("text",))))
    clip = item(16, context=4)
    longer = replace(clip, context_tokens=8)
    sizes = {"text": [item(4)], "dit": [clip]}
    # Keys and values of 8 x 16 weights, the core of cross-attention and the caption's projection,
    # all with both gradients but the last one, before which nothing is trained.
    per_token = 3 * 2 * (2 * 8 * 16 + 4 * 16 * 8) + 2 * 2 * 8 * 8
    more = batch_flops(shape, [sizes | {"dit": [longer]}]) - batch_flops(shape, [sizes])
    assert more == 4 * per_token
