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


def tiny_provider(*, finalized: bool = True, **changes: Any) -> Any:
    """A Qwen2.5-VL of 4 vision and 3 language layers, of Megatron's local layers."""
    from megatron.bridge.models.qwen_vl.qwen25_vl_provider import Qwen25VLModelProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionConfig

    vision = Qwen2_5_VLVisionConfig(
        depth=4,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=2,
        out_hidden_size=32,
        window_size=8,
        fullatt_block_indexes=[1, 3],
    )
    vision._attn_implementation = "sdpa"
    given = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 64,
        "seq_length": SEQUENCE,
        "vision_config": vision,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "mrope_section": [1, 1, 2],
        "transformer_layer_spec": lambda config: get_gpt_layer_local_spec(normalization="RMSNorm"),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "share_embeddings_and_output_weights": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
    }
    provider = Qwen25VLModelProvider(**{**given, **changes})
    if finalized:
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        provider.finalize()
    return provider


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
