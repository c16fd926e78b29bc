"""Images: dynamic resolution and patches.

An image keeps its own resolution: it is scaled to the grid of patches that fits its aspect ratio
and size best, within a minimum and a maximum number of language tokens.  A *group* is a square of
2x2 patches: it becomes one language token, so both sides of a grid are even.

Patches are stored group-major: groups row by row, and inside a group its top left, top right,
bottom left and bottom right patch.  So the 2x2 merge is a view: ``[n, h] -> [n / 4, 4 * h]``.
The values of a patch are ordered (channel, row, column), as a flattened convolution kernel is.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_dip.errors import DataError

__all__ = [
    "NUM_CHANNELS",
    "PATCHES_PER_TOKEN",
    "ImageLimits",
    "blank_patches",
    "choose_grid",
    "image_patches",
    "num_image_tokens",
    "patch_coordinates",
]

NUM_CHANNELS = 3
PATCHES_PER_TOKEN = 4
# Of two grids, one may distort the aspect ratio by x % more if it keeps 2x % more of the area.
_AREA_WEIGHT = 0.5


class ImageLimits(NamedTuple):
    """What an image may become: pixels per patch side, language tokens per image."""

    patch_size: int
    min_image_tokens: int
    max_image_tokens: int

    def check(self) -> None:
        """
        Raises:
            DataError: The patch is empty, or no number of tokens lies within the limits.
        """
        if self.patch_size < 1:
            raise DataError(f"patch_size is {self.patch_size}; give a number of pixels, e.g. 14")
        if not 1 <= self.min_image_tokens <= self.max_image_tokens:
            raise DataError(
                f"min_image_tokens is {self.min_image_tokens} and max_image_tokens is "
                f"{self.max_image_tokens}; expected 1 <= min_image_tokens <= max_image_tokens"
            )


def choose_grid(width: float, height: float, limits: ImageLimits) -> tuple[int, int]:
    """The (rows, columns) of patches for an image of ``width`` x ``height`` pixels.

    Among all grids with even sides and between ``min_image_tokens`` and ``max_image_tokens``
    groups, the one that comes nearest to the image's aspect ratio and area; images are enlarged
    only below the minimum and reduced only above the maximum.
    """
    limits.check()
    side = 2 * limits.patch_size
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
    return 2 * int(rows[best]), 2 * int(columns[best])


def num_image_tokens(grid: tuple[int, int]) -> int:
    """How many language tokens an image with this grid of patches stands for."""
    return grid[0] * grid[1] // PATCHES_PER_TOKEN


def image_patches(image: Image.Image, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The patches of an RGB image scaled to ``grid``, group-major.

    Returns:
        ``[rows * columns, 3 * patch_size**2]`` float32 between -1 and 1.
    """
    rows, columns = grid
    size = (columns * patch_size, rows * patch_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image, dtype=np.uint8))
    blocks = values.view(rows // 2, 2, patch_size, columns // 2, 2, patch_size, NUM_CHANNELS)
    patches = blocks.permute(0, 3, 1, 4, 6, 2, 5)
    flat = patches.reshape(rows * columns, NUM_CHANNELS * patch_size**2)
    return flat.to(torch.float32).div_(127.5).sub_(1.0)


def blank_patches(grid: tuple[int, int], patch_size: int) -> Tensor:
    """The patches of an image of an even grey, as :func:`image_patches` makes them."""
    return torch.zeros(grid[0] * grid[1], NUM_CHANNELS * patch_size**2)


def patch_coordinates(grid: tuple[int, int]) -> Tensor:
    """``[rows * columns, 2]`` int64: (row, column) of every patch, in the stored order."""
    rows, columns = grid
    numbers = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2)
    numbers = numbers.permute(0, 2, 1, 3).reshape(-1)
    return torch.stack([numbers // columns, numbers % columns], dim=1)
