"""Stages of the vision tower: images of any size in, rows for the language module out.

Patches are stored group-major: those of an m x m group are consecutive, so that joining them is a
view.  Attention is full inside an image and never leaves it.  A patch's place is told either by a
learned table, interpolated to the image's grid and added to what is embedded, or by turning queries
and keys of every layer by row and column (Qwen2-VL, arXiv 2409.12191).  With sequence parallelism
patches are embedded in full on every tensor-parallel rank, the blocks run on shards of the rows,
and the rows are gathered after the final norm.  Notation: N patches, p pixels per patch side,
H the hidden size, H_l that of the language module, S the side of the position table.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Unpack

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dip.families.data.images import Grid, group_major, patch_coordinates
from megatron_dip.families.packed.encoder import EncoderModel, EncoderStage
from megatron_dip.families.packed.media import media_of_first_rank
from megatron_dip.families.packed.stage import StageLayers, StageModule
from megatron_dip.runtime.host_copies import to_device

if TYPE_CHECKING:
    from megatron_dip.families.vlm.batches import VisionBatch

__all__ = ["VisionModel", "VisionStage", "interpolated_positions", "rotary_angles"]

_ROTARY_BASE = 10000.0


def rotary_angles(grids: Sequence[Grid], channels: int, device: torch.device | str) -> Tensor:
    """Angles by row and column of every patch, group-major: ``[N, 1, 1, channels]``, float32.

    Half of the pairs of channels turns with the row, half with the column, each with frequencies
    from 1 down to nearly 1 / 10000.  Pairs are half a head apart, as Megatron turns them.

    Args:
        grids: Of the images, whose rows come one after another.
        channels: Per attention head, a multiple of four.
        device: Of the result.
    """
    of_side = torch.arange(channels // 4, device=device) / (channels // 4)
    speeds = _ROTARY_BASE**-of_side
    # One copy for all images; angles, which are as large as queries, are made on the device.
    places = [torch.zeros(0, 2, dtype=torch.int64), *map(patch_coordinates, grids)]
    angles = to_device(torch.cat(places), device)[:, :, None] * speeds
    return angles.flatten(1).repeat(1, 2)[:, None, None, :]


def interpolated_positions(table: Tensor, grid: Grid) -> Tensor:
    """A position table ``[S, S, H]`` at every patch of ``grid``, group-major: ``[N, H]``.

    Bilinear, as ``interpolate(mode='bilinear', align_corners=False)``, but as two matrix products:
    their backward is deterministic on a GPU, and they keep the precision of the table.
    """
    side = table.shape[0]
    from_rows = _interpolation_matrix(grid.rows, side, table.dtype, table.device)
    from_columns = _interpolation_matrix(grid.columns, side, table.dtype, table.device)
    by_row = torch.einsum("rs,sth->rth", from_rows, table)
    return group_major(torch.einsum("ct,rth->rch", from_columns, by_row), grid)


# Few sizes come again and again, and each of them is some kilobytes.
@lru_cache(maxsize=1024)
def _interpolation_matrix(size: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[size, side]``: the weight of each of ``side`` points at each of ``size`` points."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) * (side / size) - 0.5
    centres = centres.clamp(0.0, side - 1.0)
    distances = (centres[:, None] - torch.arange(side, dtype=torch.float64)).abs()
    return to_device((1.0 - distances).clamp_min(0.0).to(dtype), device)


class VisionModel(EncoderModel):
    """Patch embedding and positions (first stage), layers, final norm (last stage)."""

    def __init__(
        self, stage: StageModule, *, patch_size: int, position_table_side: int | None
    ) -> None:
        config, first = stage.config, {}
        if stage.pre_process:
            values, dtype = 3 * patch_size**2, config.params_dtype
            first = {"patch_embedding": torch.nn.Linear(values, config.hidden_size, dtype=dtype)}
        super().__init__(stage, **first)
        self._has_table = position_table_side is not None
        if stage.pre_process and position_table_side is not None:
            shape = (position_table_side, position_table_side, config.hidden_size)
            self.position_table = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))

    def embed(self, batch: "VisionBatch") -> Tensor:
        """``[N, 3 * p * p]`` to ``[N, H]``."""
        weight = self.patch_embedding.weight
        shape = (sum(batch.span_lengths), weight.shape[1])
        patches = media_of_first_rank(batch.patches, shape, weight, self.tp_group, "patches")
        rows: Tensor = self.patch_embedding(patches)
        if not self._has_table:
            return rows
        # 16-bit tables are interpolated in 32 bits: the weights of four points need the precision.
        stored = self.position_table
        table = stored if stored.dtype == torch.float64 else stored.float()
        # Images of the same size share the interpolation.
        positions = {grid: interpolated_positions(table, grid) for grid in set(batch.grids)}
        return rows + torch.cat([positions[grid] for grid in batch.grids]).to(rows.dtype)

    def rotary_angles(self, batch: "VisionBatch", device: torch.device) -> Tensor | None:
        """See :class:`EncoderModel`."""
        if self._has_table:
            return None
        return rotary_angles(batch.grids, self.config.kv_channels, device)


class VisionStage(EncoderStage):
    """Layers ``[first_layer, first_layer + num_layers)`` of the vision tower.

    The first stage embeds patches, the last one joins groups of patches and projects them to the
    language module's width.  Both may have no layers.

    Args:
        config: The vision module's config, of all its layers.
        projection_config: The projector's config; its hidden size is that of the language module.
        patch_size: Pixels per patch side.
        merge_size: Patches along each side of the square that becomes a row of features.
        position_table_side: Points per side of the position table, which is interpolated to the
            grid of every image; None for rotary positions.

    Raises:
        PartitionError: The module does not have these layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        projection_config: TransformerConfig,
        *,
        patch_size: int,
        merge_size: int,
        position_table_side: int | None,
        **layers: Unpack[StageLayers],
    ) -> None:
        super().__init__(
            config,
            projection_config,
            name="vision",
            tokens_per_row=merge_size**2,
            make_model=partial(
                VisionModel, patch_size=patch_size, position_table_side=position_table_side
            ),
            **layers,
        )
