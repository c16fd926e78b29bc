"""Stages of a diffusion transformer over latent patches of video clips of any size.

Trained by rectified flow: between a clip x and noise e lies the straight line (1 - t) x + t e, and
the model learns its direction e - x from a point on it, the time t and a text.

What a stage hands on are the rows of its clips and, below them, what all later layers read beside
them: the projected text, and for every clip the embedded time and the six vectors made of it::

    [padded_rows(N) / num_shards]  rows of the clips, shared by tensor-parallel ranks
    [M]                            rows of text            } the same on
    [C]                            embedded times          } all tensor-parallel
    [6 C]                          modulation              } ranks

Notation: N patches and M text tokens in the C clips of a sub-microbatch, V values of a patch, H the
hidden size, H_t that of the text encoder.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Unpack

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.packed.attention import span_params
from megatron_dip.families.packed.shapes import ROWS_PER_CLIP
from megatron_dip.families.packed.stage import StageLayers, StageModule, pad_rows
from megatron_dip.families.t2v.dit_layer import (
    MODULATIONS,
    DitContext,
    dit_block_submodules,
    normalize,
)
from megatron_dip.runtime.host_copies import to_device

if TYPE_CHECKING:
    from megatron_dip.families.t2v.batches import DitBatch

__all__ = ["DitModel", "DitStage", "rotary_frequencies", "timestep_features"]

TIMESTEP_FEATURES = 256
_TIMESTEP_SCALE = 1000.0
_SLOWEST_PERIOD = 10000.0
_OUTPUT_MODULATIONS = 2


def rotary_frequencies(
    grids: Sequence[tuple[int, int, int]],
    channels: int,
    *,
    base: float = 10000.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Angles of rotary positions in time, height and width: ``[N, 1, 1, channels]``, float32.

    A third of the pairs of channels turns with the row, a third with the column and the rest with
    the frame, each with frequencies of its own from 1 down to 1 / base.

    Args:
        grids: Frames, rows and columns of patches of each clip.
        channels: Per attention head, even.
        base: See above.
        device: Of the result.
    """
    pairs = channels // 2
    of_side = pairs // 3
    axes = (pairs - 2 * of_side, of_side, of_side)
    speeds = [base ** (-torch.arange(count, device=device) / max(count, 1)) for count in axes]
    # One copy for all clips; angles, which are as large as hidden states, are made on the device.
    of_clips = [torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, 3) for grid in grids]
    positions = to_device(torch.cat([torch.zeros(0, 3, dtype=torch.int64), *of_clips]), device)
    rows = torch.cat([positions[:, axis, None] * speeds[axis] for axis in range(3)], dim=1)
    return torch.cat([rows, rows], dim=1)[:, None, None, :]


def timestep_features(times: Tensor) -> Tensor:
    """Sines and cosines of times between 0 and 1: ``[C]`` to ``[C, 256]``, float32."""
    half = TIMESTEP_FEATURES // 2
    exponents = torch.arange(half, device=times.device) / half
    angles = (
        _TIMESTEP_SCALE * times.float()[:, None] * torch.exp(-math.log(_SLOWEST_PERIOD) * exponents)
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Rows(NamedTuple):
    """What crosses a boundary, taken apart."""

    hidden: Tensor
    """``[rows of this rank, 1, H]``."""
    text: Tensor
    """``[M, 1, H]``."""
    times: Tensor
    """``[C, 1, H]``."""
    modulation: Tensor
    """``[C, 6, H]``."""

    def joined(self) -> Tensor:
        return torch.cat(
            [self.hidden, self.text, self.times, self.modulation.flatten(0, 1).unsqueeze(1)]
        )


class DitModel(MegatronModule):
    """Embeddings of patches, text and time (first stage), layers, output (last stage)."""

    def __init__(self, stage: StageModule, *, patch_values: int, text_size: int) -> None:
        config = stage.config
        super().__init__(config=config)
        hidden = config.hidden_size

        def linear(inputs: int, outputs: int) -> torch.nn.Linear:
            return torch.nn.Linear(inputs, outputs, dtype=config.params_dtype)

        if stage.pre_process:
            self.patch_embedding = linear(patch_values, hidden)
            self.text_projection = linear(text_size, hidden)
            self.time_in = linear(TIMESTEP_FEATURES, hidden)
            self.time_out = linear(hidden, hidden)
            self.modulation = linear(hidden, MODULATIONS * hidden)
        self.decoder = TransformerBlock(
            config=config,
            spec=dit_block_submodules(config, num_layers=stage.num_layers),
            post_layer_norm=False,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            pg_collection=stage.pg_collection,
        )
        if stage.post_process:
            self.output_modulation = linear(hidden, _OUTPUT_MODULATIONS * hidden)
            self.output = linear(hidden, patch_values)

    def embed(self, batch: "DitBatch", features: Tensor) -> _Rows:
        """All rows of the clips, not yet shared among ranks."""
        if batch.inputs is None:
            raise ValueError("the first stage needs noised latents, but the batch has none")
        dtype = self.patch_embedding.weight.dtype
        silu = torch.nn.functional.silu
        times = self.time_out(silu(self.time_in(timestep_features(batch.times).to(dtype))))
        modulation = self.modulation(silu(times))
        return _Rows(
            hidden=self.patch_embedding(batch.inputs.to(dtype)).unsqueeze(1),
            text=self.text_projection(features.to(dtype)).reshape(-1, 1, times.shape[-1]),
            times=times.unsqueeze(1),
            modulation=modulation.unflatten(1, (MODULATIONS, -1)),
        )

    def predict(self, hidden: Tensor, times: Tensor, clips: Tensor) -> Tensor:
        """The velocity of every patch: ``[N, H]``, ``[C, H]`` and ``[N]`` to ``[N, V]``."""
        vectors = self.output_modulation(torch.nn.functional.silu(times))
        shift, scale = vectors.unflatten(1, (_OUTPUT_MODULATIONS, -1)).unbind(1)
        modulated = normalize(hidden, self.config) * (1 + scale[clips]) + shift[clips]
        velocity: Tensor = self.output(modulated)
        return velocity


class DitStage(StageModule):
    """Layers ``[first_layer, first_layer + num_layers)`` of the diffusion transformer.

    The first stage embeds patches, text and time, the last one has the output and the loss.  Both
    may have no layers.

    Args:
        config: The module's config, of all its layers.
        patch_values: Values of a patch of latents.
        text_size: Width of the text features.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        patch_values: int,
        text_size: int,
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(config, **layers)
        self.dit_model = DitModel(self, patch_values=patch_values, text_size=text_size)

    def forward(
        self,
        hidden: Tensor | None,
        batch: "DitBatch",
        upstream: Tensor | None = None,
    ) -> Tensor:
        """Inner boundary rows, or the loss of every patch ``[N]`` on the last stage.

        ``upstream`` holds the text features ``[M, H_t]`` of the clips, one after another.

        Raises:
            ValueError: Latents, text features or hidden states that do not fit the batch.
        """
        hidden = self._take_input(hidden)
        num_patches = sum(batch.span_lengths)
        num_rows = self._num_rows(num_patches)
        rows = self._embed(batch, upstream, num_rows) if hidden is None else None
        if rows is None:
            assert hidden is not None
            rows = self._take_apart(hidden, batch, num_rows)
        clips = self._clips(batch, num_rows, rows.hidden.device)
        output = self._run_layers(rows, batch, num_rows, clips)
        if not self.post_process:
            return rows._replace(hidden=output).joined()
        return self._losses(output, rows.times, batch, clips)

    def _embed(self, batch: "DitBatch", features: Tensor | None, num_rows: int) -> _Rows:
        num_features = 0 if features is None else features.shape[0]
        if features is None or num_features != sum(batch.text_lengths):
            raise ValueError(
                f"{num_features} rows of text features for {sum(batch.text_lengths)} tokens of text"
            )
        rows = self.dit_model.embed(batch, features)
        hidden = pad_rows(rows.hidden, num_rows)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return rows._replace(hidden=hidden)

    def _take_apart(self, joined: Tensor, batch: "DitBatch", num_rows: int) -> _Rows:
        num_clips = len(batch.grids)
        own, text = num_rows // self.num_shards, sum(batch.text_lengths)
        expected = own + text + ROWS_PER_CLIP * num_clips
        if joined.shape[0] != expected:
            raise ValueError(
                f"hidden states of {joined.shape[0]} rows; expected {expected}: {own} of patches "
                f"(rows are shared by {self.num_shards} ranks), {text} of text and {ROWS_PER_CLIP} "
                f"for each of {num_clips} clips"
            )
        hidden, texts, times, modulation = joined.split(
            [own, text, num_clips, MODULATIONS * num_clips]
        )
        return _Rows(hidden, texts, times, modulation.unflatten(0, (num_clips, -1)).squeeze(2))

    def _clips(self, batch: "DitBatch", num_rows: int, device: torch.device) -> Tensor:
        """``[num_rows]``: the clip of every row; padding counts as the first clip's."""
        lengths = torch.tensor(batch.span_lengths)
        clips = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return to_device(pad_rows(clips, num_rows), device)

    def _run_layers(
        self,
        rows: _Rows,
        batch: "DitBatch",
        num_rows: int,
        clips: Tensor,
    ) -> Tensor:
        device = rows.hidden.device
        own = rows.hidden.shape[0]
        start = own * self.tp_group.rank() if self.config.sequence_parallel else 0
        context = DitContext(
            text=rows.text,
            modulation=rows.modulation,
            clips=clips[start : start + own],
            text_spans=span_params(
                batch.span_lengths,
                num_rows=num_rows,
                device=device,
                context_lengths=batch.text_lengths,
            ),
        )
        angles = rotary_frequencies(batch.grids, self.config.kv_channels, device=device)
        spans = span_params(batch.span_lengths, num_rows=num_rows, device=device)
        spans.rotary_places = slice(None)
        decoder = self.dit_model.decoder
        decoder.set_input_tensor(rows.hidden)
        output: Tensor = decoder(
            hidden_states=rows.hidden,
            attention_mask=None,
            context=context,
            rotary_pos_emb=pad_rows(angles, num_rows),
            packed_seq_params=spans,
        )
        decoder.set_input_tensor(None)
        return output

    def _losses(self, hidden: Tensor, times: Tensor, batch: "DitBatch", clips: Tensor) -> Tensor:
        """Mean squared error of the velocity of every patch."""
        if batch.targets is None:
            raise ValueError("the last stage needs target velocities, but the batch has none")
        if self.config.sequence_parallel:
            # Every rank computes the loss of all rows: the gradient that arrives is complete.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        num_patches = len(batch.targets)
        velocity = self.dit_model.predict(
            hidden[:num_patches, 0], times.squeeze(1), clips[:num_patches]
        )
        # 16 bits are too few for a mean of squares.
        dtype = torch.promote_types(velocity.dtype, torch.float32)
        errors: Tensor = (velocity.to(dtype) - batch.targets.to(dtype)).square().mean(dim=1)
        return errors
