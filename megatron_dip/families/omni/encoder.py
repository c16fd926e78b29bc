"""Stages of an audio encoder after Whisper (arXiv 2212.04356): log-mel frames in, features out.

Two convolutions over time, the second one with stride 2, make tokens of frames; sines mark their
places.  A clip keeps its own length: nothing is padded to 30 seconds.  Groups of four tokens
become one row for the language module.  Notation: N tokens, F = 2 N frames, H the hidden size.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Unpack

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.omni.audio import TOKENS_PER_ROW
from megatron_dip.families.packed.encoder import EncoderModel, EncoderStage
from megatron_dip.families.packed.media import media_of_first_rank
from megatron_dip.families.packed.stage import StageLayers, StageModule

if TYPE_CHECKING:
    from megatron_dip.families.omni.batches import AudioBatch

__all__ = ["AudioModel", "AudioStage", "sinusoids"]

_SLOWEST_PERIOD = 10000.0


def sinusoids(length: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Sines and cosines of places: ``[length, channels]``, float32."""
    half = channels // 2
    exponents = torch.arange(half, device=device)
    speeds = torch.exp(-math.log(_SLOWEST_PERIOD) / max(half - 1, 1) * exponents)
    angles = torch.arange(length, device=device)[:, None] * speeds[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioModel(EncoderModel):
    """Convolutions and places (first stage), layers, final norm (last stage)."""

    def __init__(self, stage: StageModule, *, num_mels: int) -> None:
        first = {}
        if stage.pre_process:
            size, dtype = stage.config.hidden_size, stage.config.params_dtype
            first = {
                "conv_in": torch.nn.Conv1d(num_mels, size, 3, padding=1, dtype=dtype),
                "conv_out": torch.nn.Conv1d(size, size, 3, stride=2, padding=1, dtype=dtype),
            }
        super().__init__(stage, **first)

    def embed(self, batch: "AudioBatch") -> Tensor:
        """``[F, mels]`` to ``[N, H]``, clip by clip: convolutions never reach into another."""
        weight = self.conv_in.weight
        shape = (2 * sum(batch.span_lengths), weight.shape[1])
        mels = media_of_first_rank(batch.mels, shape, weight, self.tp_group, "log-mel frames")
        gelu = torch.nn.functional.gelu
        rows = []
        for clip in mels.split([2 * length for length in batch.span_lengths]):
            found = gelu(self.conv_out(gelu(self.conv_in(clip.T[None]))))[0].T
            places = sinusoids(len(found), found.shape[1], found.device)
            rows.append(found + places.to(found.dtype))
        return torch.cat(rows)


class AudioStage(EncoderStage):
    """Layers ``[first_layer, first_layer + num_layers)`` of the audio encoder.

    Args:
        config: The module's config, of all its layers.
        projection_config: The projector's config; its hidden size is that of the language module.
        num_mels: Channels of the log-mel frames.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projection_config: TransformerConfig,
        *,
        num_mels: int,
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(
            config,
            projection_config,
            name="audio",
            tokens_per_row=TOKENS_PER_ROW,
            make_model=partial(AudioModel, num_mels=num_mels),
            **layers,
        )
