"""A small MimoModel: CLIP on images, an encoder of which nothing is known on sounds, and a GPT."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGE_TOKEN, SOUND_TOKEN = 60, 61
ROWS_PER_IMAGE = 5  # four patches and a class token
ROWS_PER_SOUND = 3
NUM_TOKENS = 16


def config(num_layers, hidden_size, dtype):
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=2,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        params_dtype=dtype,
    )


class SoundEncoder(torch.nn.Module):
    """An encoder of which nothing is known."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6, dtype=dtype)

    def forward(self, frames):
        return torch.tanh(self.linear(frames))


def modality(submodules, name, encoder, input_width, dtype):
    projection = {"in_features": input_width, "out_features": 16, "dtype": dtype}
    return ModuleSpec(
        submodules,
        submodules={
            "encoders": {name: encoder},
            "input_projections": [ModuleSpec(torch.nn.Linear, params=projection)],
        },
    )


def mimo_config(*modalities, dtype=torch.float64):
    """Of some of the modalities ``images`` and ``sounds``."""
    clip = {
        "transformer_config": config(3, 8, dtype),
        "transformer_layer_spec": get_vit_layer_with_local_spec(),
        "ln_pre_impl": WrappedTorchNorm,
        "patch_dim": 2,
        "img_h": 4,
        "img_w": 4,
    }
    specs = {
        "images": modality(
            VisionModalitySubmodules, "clip", ModuleSpec(CLIPViTModel, params=clip), 8, dtype
        ),
        "sounds": modality(
            AudioModalitySubmodules,
            "frames",
            ModuleSpec(SoundEncoder, params={"dtype": dtype}),
            6,
            dtype,
        ),
    }
    language = {
        "config": config(3, 16, dtype),
        "transformer_layer_spec": get_gpt_layer_local_spec(),
        "vocab_size": 64,
        "max_sequence_length": NUM_TOKENS,
        "position_embedding_type": "rope",
    }
    tokens = {"images": IMAGE_TOKEN, "sounds": SOUND_TOKEN}
    return MimoModelConfig(
        language_model_spec=ModuleSpec(GPTModel, params=language),
        modality_submodules_spec={name: specs[name] for name in modalities},
        special_token_ids={name: tokens[name] for name in modalities},
    )
