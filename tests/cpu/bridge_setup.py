"""What the tests of megatron-bridge's models share: its import on a CPU, and a tiny Qwen2.5-VL.

megatron-bridge imports Transformer Engine, modelopt and nvidia-resiliency-ext at top level, also
where nothing of them is used.  None of them installs without a GPU's tools, so modules that hold
nothing but classes stand for them here; Megatron-Core must have been imported before, or it would
believe that Transformer Engine is there.
"""

import importlib.machinery
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from typing import Any, ClassVar

_MISSING = ("transformer_engine", "modelopt", "nvidia_resiliency_ext")


class _Nothing(type):
    """A class in which every name is such a class, and of which a call makes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> None:
        return None


class _StandIn(types.ModuleType):
    """A module in which every name is a class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Nothing(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in _MISSING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def stand_in() -> None:
    """Let imports of the missing packages find something."""
    sys.meta_path.append(_Finder())


IMAGE_TOKEN, VIDEO_TOKEN = 60, 61
SEQUENCE = 24


VISION = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
    "window_size": 8,
    "fullatt_block_indexes": [1, 3],
}
LANGUAGE = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
}


def tiny_provider(**changes: Any) -> Any:
    """A Qwen2.5-VL of 4 vision and 3 language layers, of Megatron's local layers."""
    from megatron.bridge.models.qwen_vl.qwen25_vl_provider import Qwen25VLModelProvider
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionConfig

    vision = Qwen2_5_VLVisionConfig(**VISION)
    vision._attn_implementation = "sdpa"
    given = {
        **LANGUAGE,
        "vision_config": vision,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False,
    }
    return on_cpu(Qwen25VLModelProvider(**given), **changes)


def on_cpu(provider: Any, **changes: Any) -> Any:
    """``provider`` with Megatron's local layers, and without kernels that a CPU lacks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    local = {
        "transformer_layer_spec": lambda _: get_gpt_layer_local_spec(normalization="RMSNorm"),
        "seq_length": SEQUENCE,
        "mrope_section": [1, 1, 2],
        "attention_dropout": 0.0,
        **dict.fromkeys(
            (
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "masked_softmax_fusion",
                "persist_layer_norm",
                "apply_rope_fusion",
                "gradient_accumulation_fusion",
                "cross_entropy_loss_fusion",
            ),
            False,
        ),
    }
    for name, value in {**local, **changes}.items():
        setattr(provider, name, value)
    return provider


def finalized(provider: Any) -> Any:
    """As megatron-bridge's loop does it, for a provider without that loop."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    return provider


def save_hugging_face_model(folder: Path) -> None:
    """Random weights of a tiny Qwen2.5-VL, the same at every call."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    language = {
        "num_hidden_layers": LANGUAGE["num_layers"],
        "hidden_size": LANGUAGE["hidden_size"],
        "intermediate_size": LANGUAGE["ffn_hidden_size"],
        "num_attention_heads": LANGUAGE["num_attention_heads"],
        "num_key_value_heads": LANGUAGE["num_query_groups"],
        "vocab_size": LANGUAGE["vocab_size"],
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config = Qwen2_5_VLConfig(
        text_config=language,
        vision_config=VISION,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


def tiny_batch(seed: int = 0, videos: bool = True) -> dict[str, Any]:
    """Two sequences: two images in the first, an image and a video in the second."""
    import torch
    from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (2, SEQUENCE), generator=generator)
    tokens[0, 2:6] = IMAGE_TOKEN  # 4 x 4 patches
    tokens[0, 8:14] = IMAGE_TOKEN  # 4 x 6
    tokens[1, 1:10] = IMAGE_TOKEN  # 6 x 6
    grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 6, 6]])
    visual: dict[str, Any] = {"image_grid_thw": grids}
    if videos:
        tokens[1, 12:20] = VIDEO_TOKEN  # two frames of 4 x 4
        visual["video_grid_thw"] = torch.tensor([[2, 4, 4]])
        visual["second_per_grid_ts"] = torch.tensor([1.0])
        visual["pixel_values_videos"] = torch.randn(32, 24, generator=generator)
    visual["pixel_values"] = torch.randn(16 + 24 + 36, 24, generator=generator)
    return {
        "tokens": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(2, -1).contiguous(),
        "attention_mask": None,
        "labels": torch.roll(tokens, -1, dims=1).clamp(max=50),
        "loss_mask": (tokens < 50).float(),
        "visual_inputs": GenericVisualInputs(**visual),
    }
