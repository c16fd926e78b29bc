"""Exact sizes of the five models: instantiated without memory, and what the cost model counts."""

import pytest
import torch
from launching import REPOSITORY
from megatron.core.transformer.transformer_config import TransformerConfig
from models_setup import megatron_on_cpu

from megatron_dip.costs import ModuleShape, load_model
from megatron_dip.families.packed.configs import (
    make_dit_config,
    make_language_config,
    make_projection_config,
    make_vision_config,
)
from megatron_dip.families.packed.language import LanguageStage
from megatron_dip.families.packed.stage import StageModule
from megatron_dip.families.packed.vision import VisionStage
from megatron_dip.families.t2v.dit import DitStage
from megatron_dip.families.t2v.text import TextStage

SIZES = {
    "vlm_s": {"vision": 4_515_338_752, "language": 8_030_261_248},
    "vlm_m": {"vision": 4_522_679_808, "language": 32_763_876_352},
    "vlm_l": {"vision": 24_368_015_360, "language": 72_706_203_648},
    "t2v_s": {"text": 7_504_924_672, "dit": 5_065_998_400},
    "t2v_l": {"text": 31_985_308_672, "dit": 29_370_261_568},
}
"""Parameters, as the files of the models state them.  Those of the language modules are what is
published for Llama 3 8B, Qwen2.5 32B and 72B; the text encoders are Llama 3 8B and Qwen2.5 32B less
their heads."""


@pytest.fixture(scope="module")
def base():
    """Megatron's configuration of a run that makes weights on a device without memory."""
    with megatron_on_cpu(), pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        yield TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            params_dtype=torch.bfloat16,
            bf16=True,
            transformer_impl="local",
            perform_initialization=False,
        )


def build(shape: ModuleShape, base: TransformerConfig) -> StageModule:
    """The whole module as one stage."""
    numbers = {
        name: getattr(shape, name)
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    }
    place = {"first_layer": 0, "num_layers": shape.num_layers, "first": True, "last": True}
    if shape.kind == "vit":
        assert shape.projector is not None and shape.patch_values is not None
        projection = make_projection_config(
            base,
            hidden_size=shape.projector.output_size,
            ffn_hidden_size=shape.projector.intermediate_size,
        )
        return VisionStage(
            make_vision_config(base, has_rotary=shape.is_rotary, **numbers),
            projection,
            patch_size=round((shape.patch_values / 3) ** 0.5),
            merge_size=round(shape.projector.merge**0.5),
            position_table_side=round(shape.num_positions**0.5) or None,
            **place,
        )
    if shape.kind == "dit":
        return DitStage(
            make_dit_config(base, **numbers),
            patch_values=shape.patch_values,
            text_size=shape.context_size,
            **place,
        )
    config = make_language_config(
        base, num_query_groups=shape.query_groups, qkv_bias=shape.qkv_bias, **numbers
    )
    stage = LanguageStage if shape.has_head else TextStage
    return stage(config, vocab_size=shape.vocab_size, max_sequence_length=8192, **place)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_exactly_the_parameters_that_are_counted(base, name):
    model = load_model(REPOSITORY / "configs" / "models" / f"{name}.yaml")
    found = {}
    for shape in model.modules:
        stage = build(shape, base)
        assert all(parameter.is_meta for parameter in stage.parameters())
        found[shape.name] = sum(parameter.numel() for parameter in stage.parameters())
    counted = {shape.name: shape.num_parameters() for shape in model.modules}
    print(f"{name}: {found}, {sum(found.values()):,} in all")
    assert found == counted
    assert found == SIZES[name]
