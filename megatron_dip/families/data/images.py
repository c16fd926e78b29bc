"""Images: dynamic resolution and patches.

An image keeps its own resolution: it is scaled to the grid of patches that fits its aspect ratio
and size best, within a minimum and a maximum number of language tokens.  A *group* is a square of
m x m patches, m being the merge size: it becomes one language token, so both sides of a grid are
multiples of m.

Patches are stored group-major: groups row by row, and inside a group its patches row by row.  So
the merge is a view: ``[n, h] -> [n / m^2, m^2 * h]``.
The values of a patch are ordered (channel, row, column), as a flattened convolution kernel is.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_dip.costs import ItemSize
from megatron_dip.errors import DataError

__all__ = [
    "NUM_CHANNELS",
    "Grid",
    "ImageLimits",
    "blank_patches",
    "choose_grid",
    "group_major",
    "image_item",
    "image_patches",
    "patch_coordinates",
]

NUM_CHANNELS = 3
# Of two grids, one may distort the aspect ratio by x % more if it keeps 2x % more of the area.
_AREA_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Grid:
    """The patches of an image, and how many of them become one language token.

    Raises:
        DataError: The sides are no multiples of those of a group.
    """

    rows: int
    columns: int
    merge_size: int
    """Patches along each side of a group."""

    def __post_init__(self) -> None:
        sides, merge = (self.rows, self.columns), self.merge_size
        if merge < 1 or any(side < 1 or side % merge for side in sides):
            raise DataError(
                f"a grid of {self.rows} x {self.columns} patches does not fit merge_size {merge} "
                f"(expected positive multiples of it along both sides)"
            )

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Language tokens that the image stands for."""
        return self.num_patches // self.merge_size**2


class ImageLimits(NamedTuple):
    """What an image may become: pixels per patch side, language tokens per image."""

    patch_size: int
    min_image_tokens: int
    max_image_tokens: int
    merge_size: int = 2
    """Patches along each side of the square that becomes a language token."""

    def check(self) -> None:
        """
        Raises:
            DataError: Patch or group are empty, or no number of tokens lies within the limits.
        """
        if self.patch_size < 1:
            raise DataError(f"patch_size is {self.patch_size}; give a number of pixels, e.g. 14")
        if self.merge_size < 1:
            raise DataError(f"merge_size is {self.merge_size}; give a number of patches, e.g. 2")
        if not 1 <= self.min_image_tokens <= self.max_image_tokens:
            raise DataError(
                f"min_image_tokens is {self.min_image_tokens} and max_image_tokens is "
                f"{self.max_image_tokens}; expected 1 <= min_image_tokens <= max_image_tokens"
            )


def choose_grid(width: float, height: float, limits: ImageLimits) -> Grid:
    """The patches for an image of ``width`` x ``height`` pixels.

    Among all grids of whole groups, between ``min_image_tokens`` and ``max_image_tokens`` of
    them, the one that comes nearest to the image's aspect ratio and area; images are enlarged
    only below the minimum and reduced only above the maximum.
    """
    limits.check()
    merge = limits.merge_size
    side = merge * limits.patch_size
    aspect = width / height
    area = width * height / side**2
    area = min(max(area, limits.min_image_tokens), limits.max_image_tokens)
    rows = np.arange(1, limits.max_image_tokens + 1)
    fewest = -(-limits.min_image_tokens // rows)
    most = limits.max_image_tokens // rows
    # For a given number of rows the cost has its minimum at rows * aspect, as aspect weighs more.
    below = np.clip(np.floor(rows * aspect), fewest, most)
    above = np.clip(np.ceil(rows * aspect), fewest, most)
    rows = np.concatenate([rows, rows])
    columns = np.concatenate([below, above])
    distortion = np.abs(np.log(columns / rows / aspect))
    resize = np.abs(np.log(rows * columns / area))
    cost = distortion + _AREA_WEIGHT * resize
    cost[np.concatenate([fewest > most, fewest > most])] = math.inf
    best = int(np.argmin(cost))
    return Grid(merge * int(rows[best]), merge * int(columns[best]), merge)


def group_major(values: Tensor, grid: Grid) -> Tensor:
    """What belongs to patches, from rows and columns to the stored order.

    Args:
        values: ``[rows, columns, ...]``.

    Returns:
        ``[rows * columns, ...]``.
    """
    merge = grid.merge_size
    blocks = values.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2)
    return blocks.reshape(grid.num_patches, *values.shape[2:])


def image_item(grid: Grid) -> ItemSize:
    """The size of an image with this grid of patches, as an item of a vision module."""
    patches = grid.num_patches
    return ItemSize(tokens=patches, spans=(patches,), output_tokens=grid.num_tokens)


def image_patches(image: Image.Image, grid: Grid, patch_size: int) -> Tensor:
    """The patches of an RGB image scaled to ``grid``, group-major.

    Returns:
        ``[rows * columns, 3 * patch_size**2]`` float32 between -1 and 1.
    """
    size = (grid.columns * patch_size, grid.rows * patch_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    blocks = values.view(grid.rows, patch_size, grid.columns, patch_size, NUM_CHANNELS)
    patches = group_major(blocks.permute(0, 2, 4, 1, 3), grid)
    return patches.flatten(1).to(torch.float32).div_(127.5).sub_(1.0)


def blank_patches(grid: Grid, patch_size: int) -> Tensor:
    """The patches of an image of an even grey, as :func:`image_patches` makes them."""
    return torch.zeros(grid.num_patches, NUM_CHANNELS * patch_size**2)


def patch_coordinates(grid: Grid) -> Tensor:
    """``[rows * columns, 2]`` int64: (row, column) of every patch, in the stored order."""
    places = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.columns))
    return group_major(places.view(grid.rows, grid.columns, 2), grid)
