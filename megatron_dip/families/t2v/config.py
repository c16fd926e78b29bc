"""The configuration of text-to-video models; see ``configs/t2v_tiny.yaml``."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from megatron_dip.costs.shapes import ModelShape, ModuleShape
from megatron_dip.families.forms import (
    DataForm,
    FamilyConfig,
    MegatronArguments,
    TextConfig,
    TransformerForm,
)
from megatron_dip.forms import Form
from megatron_dip.limits import MOST_TOKENS, Size, Tokens

__all__ = ["DitConfig", "T2vConfig", "T2vDataConfig", "T2vModelConfig"]

_PATCH_CELLS = 4
"""Latent cells of a patch: 2 x 2 of one frame."""
_ROWS_PER_CLIP = 7


class DitConfig(TransformerForm):
    """A diffusion transformer over patches of 2x2 latent cells."""

    part_names = ("embedding", "text_projection", "time", "layers", "output")
    latent_channels: Size = 16

    @property
    def patch_values(self) -> int:
        """Values of a patch."""
        return _PATCH_CELLS * self.latent_channels


class T2vModelConfig(Form):
    """The modules of a text-to-video model."""

    text: TextConfig
    """Used without its head; ``seq_length`` is the longest caption."""
    dit: DitConfig


class T2vDataConfig(DataForm):
    """Video-text pairs: ``path`` is a JSON list of id, video and caption."""

    video_folder: Path
    vae: Path | None = None
    """A folder of diffusers with an AutoencoderKL; a fixed transform where not given."""
    max_frames: Size = 16
    frame_stride: Size = 1
    """Every so many-th frame of a video is taken."""
    min_frame_tokens: Tokens = 4
    """Least patches of a frame."""
    max_frame_tokens: Tokens = 256
    buckets: tuple[tuple[Size, Size, Size], ...] = ()
    """Frames, rows and columns of patches: the only sizes that clips get; native sizes within the
    limits where not given."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.min_frame_tokens > self.max_frame_tokens:
            raise ValueError(
                f"min_frame_tokens {self.min_frame_tokens} is above max_frame_tokens "
                f"{self.max_frame_tokens}"
            )
        if self.most_clip_tokens > MOST_TOKENS:
            raise ValueError(
                f"clips have up to {self.most_clip_tokens:,} patches (expected at most "
                f"{MOST_TOKENS:,}: fewer frames, or fewer patches of one)"
            )
        return self

    @property
    def most_clip_tokens(self) -> int:
        """Patches of the largest clip."""
        sizes = [frames * rows * columns for frames, rows, columns in self.buckets]
        return max(sizes, default=self.max_frames * self.max_frame_tokens)


class T2vConfig(FamilyConfig):
    """A text-to-video model, its schedule and its data."""

    family: Literal["t2v"]
    model: T2vModelConfig
    data: T2vDataConfig

    def model_shape(self) -> ModelShape:
        """A text encoder, and the diffusion transformer that reads its features."""
        text, dit = self.model.text, self.model.dit
        return ModelShape(
            name="text-to-video",
            modules=(
                text.shape("text", has_head=False),
                ModuleShape(
                    name="dit",
                    kind="dit",
                    **dit.sizes(),
                    upstream=("text",),
                    trainable=dit.trainable,
                    patch_values=dit.patch_values,
                    context_size=text.hidden_size,
                ),
            ),
        )

    def module_forms(self) -> dict[str, TransformerForm]:
        """See :class:`FamilyConfig`."""
        return {"text": self.model.text, "dit": self.model.dit}

    def megatron_arguments(self) -> MegatronArguments:
        """See :class:`FamilyConfig`.

        ``seq_length`` has room for what crosses a boundary of Megatron's own schedule for a clip:
        its patches, its text and its time.
        """
        dit = self.model.dit
        rows = self.data.most_clip_tokens + self.model.text.seq_length + _ROWS_PER_CLIP
        return dit.norm_arguments() | {
            "num_layers": dit.num_layers,
            "hidden_size": dit.hidden_size,
            "ffn_hidden_size": dit.ffn_hidden_size,
            "num_attention_heads": dit.num_attention_heads,
            "seq_length": rows,
            "max_position_embeddings": rows,
            "position_embedding_type": "rope",
            "normalization": "LayerNorm",
            "untie_embeddings_and_output_weights": True,
            "tokenizer_type": "NullTokenizer",
            "vocab_size": self.model.text.vocab_size,
        }
