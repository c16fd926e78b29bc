"""Images as LaVIN's vision tower takes them: squares, scaled by ImageNet's mean and deviation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_dip.families.data.image_files import decode_image
from megatron_dip.families.data.images import NUM_CHANNELS

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "load_patches"]

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's, which the published models were tuned with; CLIP's own are others."""


def load_patches(path: str | Path, *, image_size: int, patch_size: int) -> Tensor:
    """The patches of an image, row by row: ``[(S / p)**2, 3 * p * p]`` float32.

    Values of a patch are ordered (channel, row, column), as a flattened convolution kernel is.

    Raises:
        DataError: The file is missing, broken or cut short; the message names it.
    """
    image = decode_image(path).resize((image_size, image_size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image, dtype=np.uint8)).to(torch.float32) / 255.0
    values = (values - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    side = image_size // patch_size
    blocks = values.view(side, patch_size, side, patch_size, NUM_CHANNELS)
    return blocks.permute(0, 2, 4, 1, 3).reshape(side * side, NUM_CHANNELS * patch_size**2)
